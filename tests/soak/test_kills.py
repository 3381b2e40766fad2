"""Whatever moment a run is killed at, the same command goes on by itself and ends where the straight run ends."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hf_detrkd.artifacts.whole_checkpoints import checkpoints_of, fault_of, newest_whole
from tests.processes import finish, start
from tests.runs import assert_close, run, work


KILLS = int(os.environ.get("HF_DETRKD_SOAK", "4"))  # of each kind of run; `make soak` sets more
MOST_STARTS = 8  # times as many starts as kills
RUNS: dict[str, dict[str, Any]] = {
    # Saves and evaluates after every step, so that most of its time is that of saves and evaluations.
    "saves": {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True},
    "trains": {"save_steps": 3, "gradient_accumulation_steps": 2, "augment": True},
}


def arguments_of(kind: str) -> dict[str, Any]:
    common = {"method": "kd_detr", "method_config": {"general_points": 4}, "widths": [32, 64], "max_steps": 12}
    common |= {"save_strategy": "steps", "save_total_limit": 2, "ema_decay": 0.7, "probe": False, "images": 12}
    return common | RUNS[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_is_killed_again_and_again_ends_like_the_straight_one(kind: str, tmp_path: Path) -> None:
    draw, arguments = random.Random(kind), arguments_of(kind)
    straight = run(tmp_path / "straight", **arguments)
    started = time.monotonic()
    run(tmp_path / "again", **arguments)
    length, kills, starts = time.monotonic() - started, 0, 0
    while kills < KILLS:
        folder, done = tmp_path / f"killed{starts}", False
        while not done and kills < KILLS:
            starts += 1
            assert starts < MOST_STARTS * KILLS + 10, "the run makes no progress"
            done = killed(folder, arguments, draw.uniform(0.1, 0.9) * length, kills)
            kills += not done
            assert_sound(folder)
        finish_run(folder, arguments)
        assert_close(straight, load_file(folder / "weights.safetensors"), 0.0)
        assert figures_of(folder) == figures_of(tmp_path / "straight")
    print(f"{kind}: {kills} kills, {starts} starts")


@pytest.mark.slow
def test_signals_at_random_moments_save_and_end(tmp_path: Path) -> None:
    """SIGTERM, as schedulers send it: the run ends in time with its status, or had ended by itself."""
    draw, arguments, stops = random.Random(0), arguments_of("trains"), 0
    straight = run(tmp_path / "straight", **arguments)
    while stops < max(KILLS // 2, 2):
        folder, code = tmp_path / f"stopped{stops}", None
        while code != 0:
            process = start(work, (folder, resuming(folder, arguments)), tmp_path / "stopped.log")
            while not (folder / ".lock").exists() and process.is_alive():  # its training has not begun
                time.sleep(0.05)
            process.join(draw.uniform(0.0, 2.0))
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM)
            process.join(30)
            code = process.exitcode
            # Before the training and after it a signal ends the process at once.
            assert code in (0, 143, -signal.SIGTERM), (code, (tmp_path / "stopped.log").read_text()[-3000:])
            stops += code == 143
            assert code != 143 or newest_whole(folder)[0] is not None
            assert_sound(folder)
        assert_close(straight, load_file(folder / "weights.safetensors"), 0.0)
    print(f"signals: {stops} stops")


def killed(folder: Path, arguments: dict[str, Any], seconds: float, number: int) -> bool:
    """Starts or resumes the run and kills it after so many seconds; true if it had ended."""
    log = folder.parent / f"{folder.name}-{number}.log"
    process = start(work, (folder, resuming(folder, arguments)), log)
    process.join(seconds)
    if not process.is_alive():
        assert process.exitcode == 0, log.read_text()[-3000:]
        return True
    process.kill()
    process.join()
    # It may have ended by itself between the question and the signal.
    assert process.exitcode in (0, -signal.SIGKILL), (process.exitcode, log.read_text()[-3000:])
    return process.exitcode == 0


def finish_run(folder: Path, arguments: dict[str, Any]) -> None:
    if not (folder / "report.json").is_file():
        log = folder.parent / f"{folder.name}-last.log"
        finish(start(work, (folder, resuming(folder, arguments)), log), log)


def figures_of(folder: Path) -> dict[str, float]:
    metrics = json.loads((folder / "report.json").read_text())["metrics"]
    return {name: value for name, value in metrics.items() if "map" in name or name == "eval_loss"}


def resuming(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    whole = newest_whole(folder)[0] if folder.is_dir() else None
    return arguments if whole is None else arguments | {"resume_from_checkpoint": "true"}


def assert_sound(folder: Path) -> None:
    """Every checkpoint that has its name is whole."""
    assert {path.name: fault_of(path) for path in checkpoints_of(folder) if fault_of(path)} == {}
