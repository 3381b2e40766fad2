"""The trackers' own clients, offline, hold the pictures of a run, and two trainings of a process do not mix."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_detrkd import DistillationConfig
from hf_detrkd.artifacts.trackers import INSTALLED, close_trackers, track_pictures
from tests.runs import make_trainer


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "predictions.png"
    Image.new("RGB", (30, 20), "red").save(file)
    return file


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackers write into the test's folder alone."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_with_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extras: dict[str, str]
) -> None:
    assert DistillationConfig(str(tmp_path), report_to=name).report_to == [name]
    monkeypatch.setitem(INSTALLED, name, lambda: False)
    message = rf"report_to {name} needs the package {name}: pip install 'hf-detrkd\[trackers\]'"
    with pytest.raises(ImportError, match=message):
        DistillationConfig(str(tmp_path), report_to=["codecarbon", name])
    assert name in extras["trackers"]


def trained(folder: Path, tracker: str) -> Any:
    trainer = make_trainer(folder, report_to=tracker, max_steps=1)
    trainer.train()
    trainer.evaluate()
    return trainer


def test_tensorboard_has_the_pictures_beside_the_losses(tmp_path: Path, picture: Path) -> None:
    trainer = trained(tmp_path / "student", "tensorboard")
    track_pictures(trainer, [picture, tmp_path / "missing.png"])
    close_trackers(trainer)
    seen = EventAccumulator(str(next((tmp_path / "student" / "runs").iterdir()))).Reload()
    assert seen.Tags()["images"] == ["pictures/predictions"]
    (image,) = seen.Images("pictures/predictions")
    assert (image.step, image.width, image.height) == (1, 30, 20)
    assert "train/task_loss" in seen.Tags()["scalars"] and "eval/map" in seen.Tags()["scalars"]


def test_wandb_has_the_pictures_and_a_run_for_each_training(tmp_path: Path, picture: Path, offline: None) -> None:
    names = []
    for name in ("control", "student"):
        trainer = trained(tmp_path / name, "wandb")
        track_pictures(trainer, [picture])
        names.append(sys.modules["wandb"].run.name)
        close_trackers(trainer)
    assert names == ["control", "student"]
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    for run in runs:
        (kept,) = (run / "files" / "media" / "images" / "pictures").iterdir()
        assert Image.open(kept).size == (30, 20)


TRACKIO = """
import sys
from pathlib import Path
from tests.artifacts.test_trackers import trained
from hf_detrkd import DistillationConfig
from hf_detrkd.artifacts.trackers import INSTALLED, close_trackers, track_pictures

trainer = trained(Path(sys.argv[1]), "trackio")
track_pictures(trainer, [Path(sys.argv[2])])
close_trackers(trainer)
"""


def test_trackio_has_the_pictures_in_one_run_with_the_evaluation(tmp_path: Path, picture: Path) -> None:
    # In a process of its own: trackio takes its folder from the environment when it is imported.
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-c", TRACKIO, str(tmp_path / "student"), str(picture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    listed = subprocess.run(
        [sys.executable, "-m", "trackio.cli", "list", "runs", "--project", "huggingface"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert listed.stdout.count("student") == 1, listed.stdout + listed.stderr
    (kept,) = (tmp_path / "trackio" / "media").rglob("*.png")
    assert Image.open(kept).size == (30, 20)
