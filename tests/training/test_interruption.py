"""Runs that are stopped, killed while they save, or find a torn checkpoint: nothing is lost, and no state is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_detrkd import DistillationTrainer
from hf_detrkd.artifacts.whole_checkpoints import MANIFEST, checkpoints_of, fault_of, newest_whole, rotate
from hf_detrkd.training.run_stopped import RunStopped
from tests.runs import assert_close, make_trainer, run, weights_of
from tests.together import run_together


OPTIONS: dict[str, Any] = {
    "method": "kd_detr",
    "method_config": {"general_points": 4},
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "ema_decay": 0.7,
    "probe": False,
    "max_gradient_ratio": 0,
}


class SignalAt(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, number: int):
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> DistillationTrainer:
    """A run of four steps that nothing disturbs."""
    trainer = make_trainer(tmp_path_factory.mktemp("straight"), **OPTIONS)
    trainer.train()
    return trainer


@pytest.fixture
def folder(straight: DistillationTrainer, tmp_path: Path) -> Path:
    """Its output folder, as if it had ended after the third step."""
    shutil.copytree(straight.args.output_dir, tmp_path / "run", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    return tmp_path / "run"


def assert_ends_alike(trainer: DistillationTrainer, straight: DistillationTrainer) -> None:
    assert trainer.state.global_step == 4
    assert_close(weights_of(trainer), weights_of(straight), 0.0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_ends(number: int, code: int, straight, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    options = OPTIONS | {"save_strategy": "no", "eval_strategy": "epoch"}
    trainer = make_trainer(tmp_path, callbacks=[SignalAt(1, number)], **options)
    with pytest.raises(RunStopped) as stop:
        trainer.train()
    assert stop.value.code == code and signal.getsignal(number) == before
    assert "after step 2 of 4" in stop.value.message and "--resume_from_checkpoint true" in stop.value.message
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-2"]
    assert not any("eval_map" in entry for entry in trainer.state.log_history)
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_ends_alike(resumed, straight)


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    callbacks: list[TrainerCallback] = [SignalAt(1, signal.SIGINT), SignalAt(1, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, callbacks=callbacks, **OPTIONS).train()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-1"]
    assert signal.getsignal(signal.SIGINT) == before


def test_a_save_that_fails_leaves_no_checkpoint_of_its_name(straight, tmp_path: Path, monkeypatch) -> None:
    trainer = make_trainer(tmp_path, **OPTIONS)

    def full(self: Any, folder: str) -> None:
        if self.state.global_step == 3:
            raise OSError(28, "No space left on device")
        original(self, folder)

    original = DistillationTrainer._save_rng_state
    monkeypatch.setattr(DistillationTrainer, "_save_rng_state", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-2", "checkpoint-1"]
    assert (tmp_path / ".saving" / "checkpoint-3" / "model.safetensors").is_file()
    monkeypatch.undo()
    resumed = make_trainer(tmp_path, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    assert_ends_alike(resumed, straight)
    assert not (tmp_path / ".saving").exists()


FILES = (
    "model.safetensors",
    "config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "distillation/method.safetensors",
    "distillation/method.json",
    "distillation/trained_student.safetensors",
)
TEARS: dict[str, Callable[[Path], Any]] = {f"without {name}": lambda c, n=name: (c / n).unlink() for name in FILES}
TEARS |= {f"half of {n}": lambda c, n=n: os.truncate(c / n, (c / n).stat().st_size // 2) for n in FILES[:6]}
TEARS |= {
    "empty state": lambda c: os.truncate(c / "trainer_state.json", 0),
    "other bytes": lambda c: (c / FILES[0]).write_bytes(b"\0" * (c / FILES[0]).stat().st_size),
    "no manifest": lambda c: (c / MANIFEST).unlink(),
    "half a manifest": lambda c: os.truncate(c / MANIFEST, 60),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_known(tear: str, folder: Path) -> None:
    """All nineteen fall back to the one before, and are named where they are asked for."""
    TEARS[tear](folder / "checkpoint-3")
    whole, faults = newest_whole(folder)
    assert whole == folder / "checkpoint-2" and list(faults) == ["checkpoint-3"]
    with pytest.raises(ValueError, match=r"checkpoint-3 (lacks|has) .* The last whole one is .*checkpoint-2"):
        make_trainer(folder, **OPTIONS).train(resume_from_checkpoint=str(folder / "checkpoint-3"))


def test_a_run_goes_on_from_the_last_whole_checkpoint(folder: Path, straight, caplog) -> None:
    TEARS["half of optimizer.pt"](folder / "checkpoint-3")
    trainer = make_trainer(folder, **OPTIONS)
    trainer.train(resume_from_checkpoint=True)
    assert_ends_alike(trainer, straight)
    assert fault_of(folder / "checkpoint-3") is None  # saved again


def test_without_a_whole_checkpoint_the_run_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(ValueError, match=r"has no whole checkpoint to resume from \(checkpoint-7 has no manifest"):
        make_trainer(tmp_path, **OPTIONS).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="checkpoint-8 does not exist"):
        make_trainer(tmp_path, **OPTIONS).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_rotation_goes_by_steps_and_keeps_the_best(tmp_path: Path) -> None:
    for step in (2, 10, 9, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (1000 - step, 1000 - step))  # a clock that was set back
    rotate(tmp_path, 2, [tmp_path / "checkpoint-30", tmp_path / "checkpoint-2"])
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-30", "checkpoint-2"]
    rotate(tmp_path, None, [])
    assert len(checkpoints_of(tmp_path)) == 2


def test_the_limit_of_checkpoints_and_the_best_one_hold_in_a_run(tmp_path: Path, monkeypatch) -> None:
    options = OPTIONS | {"save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tmp_path, load_best_model_at_end=True, **options)
    figures = iter([0.3, 0.1, 0.2, 0.15])
    monkeypatch.setattr(
        trainer, "compute_metrics", lambda e, compute_result: {"map": next(figures)} if compute_result else {}
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 1 and ".saving" not in json.dumps(state)


def test_the_weights_of_a_finished_run_are_not_written_again(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **OPTIONS)
    trainer.train()
    trainer.save_model()
    file = tmp_path / "model.safetensors"
    before = (file.read_bytes(), file.stat().st_mtime_ns)
    again = make_trainer(tmp_path, **OPTIONS)
    again.load_student(tmp_path)
    again.evaluate()
    again.save_model()
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


def stop_one(folder: str, options: dict[str, Any]) -> None:
    """In two processes: a signal comes to the second alone."""
    trainer = make_trainer(folder, **options)
    rank = trainer.args.process_index
    assert trainer.args.world_size == 2
    if rank == 1:
        trainer.add_callback(SignalAt(1, signal.SIGTERM))
    with pytest.raises(RunStopped) as stop:
        trainer.train()
    print(f"process {rank}: {stop.value.code}, step {trainer.state.global_step}")
    trainer.accelerator.wait_for_everyone()


@pytest.mark.distributed
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path) -> None:
    options = OPTIONS | {"max_steps": 8, "save_strategy": "no"}
    first, second = run_together(stop_one, str(tmp_path / "run"), options)
    assert "process 0: 143, step 4" in first and "process 1: 143, step 4" in second
    assert fault_of(tmp_path / "run" / "checkpoint-4") is None
    run(tmp_path / "run", processes=2, **options, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    run(tmp_path / "straight", processes=2, **options)
    ends = [load_file(tmp_path / name / "weights.safetensors") for name in ("run", "straight")]
    assert_close(*ends, 0.0)
