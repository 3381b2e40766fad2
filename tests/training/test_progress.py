"""What a training writes on the screen: a line for each log, which a person can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from hf_detrkd.training.progress import LogLines, duration
from tests.runs import make_trainer


def state_at(step: int, steps: int = 100) -> TrainerState:
    state = TrainerState()
    state.global_step, state.max_steps = step, steps
    return state


def evaluated(lines: LogLines, step: int, found: float) -> str:
    return lines.line({"eval_map": found, "eval_map_50": 0.5, "eval_loss": 3.25}, state_at(step))


def test_a_training_log_says_loss_share_of_the_teacher_speed_and_the_time_left(monkeypatch: pytest.MonkeyPatch):
    lines, clock = LogLines(), iter([100.0, 220.0])
    monkeypatch.setattr("hf_detrkd.training.progress.time.perf_counter", lambda: next(clock))
    lines.begin(state_at(20))
    logs = {"loss": 4.0, "task_loss": 3.0, "task_box": 1.0, "learning_rate": 1e-4, "images_per_second": 58.44}
    line = lines.line(logs, state_at(60))
    assert line == "step 60/100  loss 4  distillation 25 %  lr 0.0001  58.4 images/s  2 min left"


def test_an_evaluation_says_mean_average_precision_in_percent_and_where_it_was_better():
    lines = LogLines()
    assert evaluated(lines, 10, 0.2) == "step 10/100  eval: mAP 20.0, mAP50 50.0, loss 3.25"
    assert evaluated(lines, 20, 0.1) == "step 20/100  eval: mAP 10.0, mAP50 50.0, loss 3.25 (best: 20.0 at step 10)"
    assert "best" not in evaluated(lines, 30, 0.3)
    assert "(best: 30.0 at step 30)" in evaluated(lines, 40, 0.25)


@pytest.mark.parametrize(("seconds", "words"), [(3.4, "3 s"), (125, "2 min"), (3600 * 26 + 59 * 60, "26 h 59 min")])
def test_a_duration_has_at_most_two_units(seconds: float, words: str):
    assert duration(seconds) == words


@pytest.mark.parametrize("quiet", [True, False])
def test_a_run_writes_lines_and_keeps_every_value_in_its_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: bool
):
    options: dict[str, Any] = {"max_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path, disable_tqdm=quiet, **options)
    trainer.train()
    printed = capsys.readouterr().out
    shown = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in shown] == ["step 1/2", "step 2/2", "step 2/2"]
    assert "mAP" in shown[2] and "left" in shown[0] and "{" not in printed
    assert "2 steps in " in printed
    assert "task_box" in trainer.state.log_history[0]
