"""Settings of the test suite: no network, what is slow comes first, and no garbage to search."""

from __future__ import annotations

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
# Else two equal models differ in the last bit on Intel's processors: MKL rounds by where an array lies in memory.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import gc

import pytest

from tests import ROOT


# Their helpers assert, too.
pytest.register_assert_rewrite(
    "tests.adapters", "tests.losses", "tests.export", "tests.methods", "tests.models", "tests.runs"
)

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
    "test_notebook",
    "test_overfit",
    "test_recipes",
    "training",
)


def pytest_configure(config: pytest.Config) -> None:
    """Loads the fixtures where tests run: the process that only hands them out to others starts sooner without."""
    hands_out = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("tests.fixtures")


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
