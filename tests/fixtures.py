"""Fixtures that every room's tests share: one thread, a seed per test, tiny detectors as copies."""

from __future__ import annotations

import configparser
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests import ROOT, seed_all, tiny
from tests.hub_server import HubServer


torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whatever ran before."""
    seed_all()
    return 0


@pytest.fixture
def build() -> Callable[..., transformers.PreTrainedModel]:
    """`tiny.build`."""
    return tiny.build


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Runs a test once per detector family."""
    return request.param


@pytest.fixture(params=tiny.ASKABLE)
def askable(request: pytest.FixtureRequest) -> str:
    """Runs a test once per family whose decoder takes queries from outside."""
    return request.param


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that processes started from here take for theirs."""
    with HubServer() as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            if name.startswith("HF_"):
                monkeypatch.setenv(name, value)
        yield hub


@pytest.fixture
def shapes_teacher(tmp_path: Path) -> str:
    """Folder of a random teacher of generated shapes, with its image processor."""
    from hf_detrkd.data.shapes import SHAPE_CLASSES
    from hf_detrkd.distillation.student import load_image_processor

    names = {"id2label": dict(enumerate(SHAPE_CLASSES)), "label2id": {n: i for i, n in enumerate(SHAPE_CLASSES)}}
    model = tiny.build("rt_detr", 64, **names)
    model.save_pretrained(tmp_path / "teacher")
    load_image_processor(model, image_size=(64, 64)).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


@pytest.fixture(scope="session")
def settings() -> dict[str, dict[str, str]]:
    """setup.cfg by section."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return {name: dict(section) for name, section in parser.items()}


@pytest.fixture
def extras(settings: dict[str, dict[str, str]]) -> dict[str, str]:
    """The extras of setup.cfg, each with its requirements as text."""
    return settings["options.extras_require"]
