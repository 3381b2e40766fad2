"""Memory, time and room on the disk that a run needs, from one step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_detrkd import DistillationTrainer
from hf_detrkd.cli import arguments as distill_arguments
from hf_detrkd.cli import run_setup
from hf_detrkd.cli.doctor import PeakMemory, fitting_batch
from hf_detrkd.cli.doctor import check_step as doctor_step
from hf_detrkd.cli.doctor import main as doctor
from hf_detrkd.cli.doctor.findings import Report
from tests.cli.doctor.runs import line, said


def test_the_batch_that_fits_lies_on_the_line_through_two_measured_ones() -> None:
    assert fitting_batch({2: 1.2, 4: 1.4}, 1.75) == 7
    assert fitting_batch({2: 1.2, 4: 1.4}, 1.05) == 0
    assert fitting_batch({4: 1.4, 1: 1.1}, 1.4) == 4


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, shapes: str) -> DistillationTrainer:
    """Only looked at, or asked for steps that do nothing."""
    batch = ["--per_device_train_batch_size", "16"]
    return run_setup.build_trainer(distill_arguments.parse(line(tmp_path_factory.mktemp("run"), shapes, *batch)))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes of steps, each of which takes 1 GiB and 0.1 for each image."""
    sizes: list[int] = []

    class Memory:
        gib = 0.0

        def __init__(self, device: torch.device):
            pass

        def __enter__(self) -> Memory:
            return self

        def __exit__(self, *error: object) -> None:
            self.gib = 1 + 0.1 * sizes[-1]

    def step(trainer: Any, size: int) -> dict[str, float]:
        sizes.append(size)
        return {"read": 0.1, "step": 0.2}

    monkeypatch.setattr(doctor_step, "PeakMemory", Memory)
    monkeypatch.setattr(doctor_step, "one_step", step)
    return sizes


@pytest.mark.parametrize(
    ("limit", "status", "words", "largest"),
    [
        (1.95, "problem", "16 does not fit: about 9 would fit, with --gradient_accumulation_steps", 8),
        (1.0, "problem", "not even 2 would", 2),
        (2.65, "warning", "less than a tenth is left", 16),
        (4.3, "ok", "33 would fit too", 16),
    ],
)
def test_too_little_memory_is_said_before_it_is_tried(
    trainer: Any, tried: list[int], limit: float, status: str, words: str, largest: int
) -> None:
    report = Report()
    assert doctor_step.check_step(report, trainer, limit) == (status != "problem")
    assert words in said(report, "memory", status)
    assert max(tried) == largest
    if largest == 16:
        assert report.facts["time"]["seconds"] == pytest.approx(7 * 0.3)


def test_a_device_that_runs_out_is_a_problem_and_not_a_traceback(
    trainer: Any, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    harmless = doctor_step.one_step

    def step(trainer: Any, size: int) -> dict[str, float]:
        if size > 8:
            raise torch.OutOfMemoryError("no memory")
        return harmless(trainer, size)

    monkeypatch.setattr(doctor_step, "one_step", step)
    report = Report()
    assert not doctor_step.check_step(report, trainer, 100.0)
    assert "16 does not fit" in said(report, "memory", "problem") and max(tried) == 8


def test_a_real_step_needs_more_than_a_tiny_limit_and_the_status_says_so(tmp_path: Path, shapes: str) -> None:
    own = ["--memory_limit_gb", "0.05", "--doctor_samples", "1", "--output_file", str(tmp_path / "d.json")]
    assert doctor.main([*line(tmp_path, shapes, "--min_teacher_map", "0"), *own]) == 1
    found = json.loads((tmp_path / "d.json").read_text())
    (memory,) = [finding for finding in found["findings"] if finding["subject"] == "memory"]
    assert memory["status"] == "problem" and "--per_device_train_batch_size 2 does not fit" in memory["text"]
    assert all(peak > 0.05 for peak in found["facts"]["memory"]["peak_gb"].values())


def test_memory_that_is_taken_and_given_back_inside_is_seen() -> None:
    with PeakMemory(torch.device("cpu")) as before:
        torch.ones(1)
    with PeakMemory(torch.device("cpu")) as during:
        taken = [torch.ones(2**26) for _ in range(2)]  # 0.5 GiB
        del taken
    assert before.gib + 0.3 < during.gib < before.gib + 0.8


def test_a_full_disk_is_a_problem(trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"save_total_limit": None, "load_best_model_at_end": False}
    config = replace(trainer.args, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "a" / "b"), **kept)
    assert doctor_step.checkpoints_of(config, 7, 4) == 4
    assert doctor_step.checkpoints_of(replace(config, save_total_limit=1), 7, 4) == 2
    assert doctor_step.checkpoints_of(replace(config, save_strategy="epoch"), 7, 4) == 2
    report = Report()
    doctor_step.check_disk(report, config, trainer)
    assert f"{tmp_path} has" in said(report, "disk", "ok")
    parameters = trainer.student.num_parameters()
    # Four checkpoints of weights and two moments, and the student at the end.
    assert report.facts["disk"]["needed_gb"] == pytest.approx(parameters * 4 * (4 * 3 + 1) / 2**30, rel=0.05)
    monkeypatch.setattr(doctor_step.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    report = Report()
    doctor_step.check_disk(report, config, trainer)
    assert "set --save_total_limit" in said(report, "disk", "problem")
