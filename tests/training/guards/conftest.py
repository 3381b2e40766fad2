"""A run with a teacher that can detect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from hf_detrkd import DistillationConfig, DistillationTrainer
from hf_detrkd.data import DetectionTransform, load_detection_splits
from hf_detrkd.distillation.student import build_student
from hf_detrkd.methods import CLoCKDistillConfig, KDDETRConfig
from tests import ROOT


QUICKSTART = ROOT / "scripts" / "recipes" / "quickstart"


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., DistillationTrainer]:
    """A run with the quickstart's teacher, which can detect."""
    splits = load_detection_splits("shapes", max_train_samples=8, max_eval_samples=40)
    processor = AutoImageProcessor.from_pretrained(QUICKSTART / "teacher")
    transform = DetectionTransform.for_processor(processor)

    def make(method: str = "kd_detr", **arguments: Any) -> DistillationTrainer:
        torch.manual_seed(0)
        configs = {"kd_detr": KDDETRConfig(general_points=20), "clockdistill": CLoCKDistillConfig()}
        defaults = {"per_device_train_batch_size": 2, "max_steps": 2, "save_strategy": "no", "logging_steps": 1}
        return DistillationTrainer(
            model=build_student(str(QUICKSTART / "student_config.json"), splits.train.classes),
            teacher_model=AutoModelForObjectDetection.from_pretrained(QUICKSTART / "teacher"),
            args=DistillationConfig(
                str(tmp_path / "out"),
                method=method,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                **defaults | arguments,
            ),
            method_config=[config for name, config in configs.items() if name in method.split(",")],
            processing_class=processor,
            train_dataset=splits.train.with_transform(transform),
            eval_dataset=splits.eval.with_transform(transform),
        )

    return make
