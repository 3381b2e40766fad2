"""Fixtures that every room's tests share: no network, one thread, a seed per test, tiny detectors as copies."""

from __future__ import annotations

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported

import gc
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers

from tests import ROOT, tiny


# Their helpers assert, too.
pytest.register_assert_rewrite(
    "tests.adapters", "tests.losses", "tests.export", "tests.methods", "tests.models", "tests.runs"
)
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


# What takes more than a few seconds: processes, whole runs, and grids of detectors.
SLOWER = (
    "adapters",
    "artifacts/hub",
    "artifacts/test_trackers",
    "cli",
    "distillation/test_teacher",
    "evaluation/test_trainer",
    "export",
    "fake_hub",
    "losses/test_criterion_m",
    "methods/test_clockdistill_detectors",
    "methods/test_decoding",
    "methods/test_detrdistill_detectors",
    "methods/test_kd_detr_detectors",
    "models",
    "test_loading",
    "test_matrix",
    "test_overfit",
    "test_recipes",
    "training",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of daily work, and puts them behind the slower ones, so that no worker is left with one of these
    at the end."""
    slower = {item: item.path.relative_to(ROOT / "tests").as_posix().startswith(SLOWER) for item in items}
    for item in items:
        if not slower[item] and not any(item.iter_markers("slow")):
            item.add_marker("fast")
    items.sort(key=lambda item: not slower[item])


def pytest_collection_finish() -> None:
    """What is imported stays, and is not searched for garbage, which takes 0.2 s a time; nor is there much else."""
    gc.set_threshold(100_000, 20, 20)
    _keep()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path != item.path:
        _keep()  # also what the tests of a file have imported and built for all


def _keep() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
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
