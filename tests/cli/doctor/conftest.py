"""Generated images on disk, and what the quickstart's teacher finds in them: made once."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForObjectDetection

from hf_detrkd import Teacher
from hf_detrkd.adapters import class_names
from hf_detrkd.cli.doctor import Seen, View, look
from hf_detrkd.data import load_detection_split
from hf_detrkd.distillation.teacher import NO_NORMALIZATION
from tests.cli.doctor.runs import QUICKSTART, SIDE, write_shapes


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A healthy data set of 8 images to train on and 16 to evaluate on."""
    return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def seen(shapes: str) -> list[Seen]:
    """What the quickstart's teacher finds in the evaluation images."""
    model = AutoModelForObjectDetection.from_pretrained(QUICKSTART / "teacher", dtype=torch.float32)
    teacher = Teacher(model, class_names(model.config))
    return look(teacher, load_detection_split(shapes, "validation"), View((SIDE, SIDE), NO_NORMALIZATION), 16)
