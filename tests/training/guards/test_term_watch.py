"""Every term beside the detection loss during training: measured without a trace, and a warning where it dominates."""

from __future__ import annotations

import math

import pytest
import torch

from hf_detrkd import DistillationConfig
from hf_detrkd.training import term_watch
from tests.runs import assert_close, weights_of


TERMS = [f"kd_detr_{part}_{group}" for group in ("specific", "general") for part in ("class", "box", "giou")]


def test_gradient_ratios_are_logged_and_change_nothing(make_run):
    trained = []
    for every in (0, 2):
        trainer = make_run(gradient_ratio_steps=every, max_steps=5, gradient_accumulation_steps=2, probe=False)
        trainer.train()
        trained.append(weights_of(trainer))
        entries = [entry for entry in trainer.state.log_history if "task_loss" in entry]
        measured = [[name for name in TERMS if f"{name}_gradient" in entry] for entry in entries]
        assert measured == ([[]] * 5 if every == 0 else [[], [], TERMS, [], TERMS])
        for name in TERMS if every else []:
            assert math.isfinite(entries[2][f"{name}_gradient"]) and entries[2][f"{name}_gradient"] > 0
    assert_close(trained[0], trained[1], 0.0)


def test_a_term_that_exceeds_the_task_for_long_is_one_warning(make_run, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(term_watch.logger, "warning", said.append)
    monkeypatch.setattr(term_watch, "PATIENCE", 3)
    make_run(loss_weights={"kd_detr_box_general": 1e5}, max_steps=2, probe=False).train()
    make_run(loss_weights={"kd_detr_box_general": 1e5}, max_steps=6, probe=False, distillation_weight=1e-7).train()
    assert not said
    make_run(loss_weights={"kd_detr_box_general": 1e5}, max_steps=6, probe=False).train()
    assert len(said) == 1
    assert said[0].startswith("kd_detr_box_general has exceeded the detection loss in the last 3 logs")
    assert "--calibrate_weights auto" in said[0]


def test_a_ratio_is_that_of_the_loss_as_it_is_trained_and_of_few_images(make_run):
    trainer = make_run(gradient_ratio_steps=1)
    batch = next(trainer._random_batches(1))
    batch |= {"pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1), "labels": batch["labels"] * 2}
    part = term_watch.part_of(batch)
    counts = [len(label["class_labels"]) for label in batch["labels"]]
    assert [len(label["class_labels"]) for label in part["labels"]] == sorted(counts, reverse=True)[:2]
    assert len(part["pixel_values"]) == 2 and "totals" not in part
    few = min(range(4), key=lambda row: counts[row])
    for row, label in enumerate(batch["labels"]):
        batch["labels"][row] = label | {"labeled": row == few}
    assert [label["labeled"] for label in term_watch.part_of(batch)["labels"]] == [True, False]
    ratios = []
    for step, weight in enumerate((1.0, 0.25), start=1):
        torch.manual_seed(0)
        assert trainer._watch.look(step, batch, {"kd_detr": weight}, trainer._probe_precision)
        ratios.append(trainer._watch.entries({"task_loss": 1.0}))
    for name in TERMS:
        assert ratios[1][f"{name}_gradient"] == pytest.approx(0.25 * ratios[0][f"{name}_gradient"], rel=1e-3)


def test_values_that_are_only_reported_have_no_weight(make_run):
    trainer = make_run(method="task_adaptive", max_steps=1, probe=False, min_teacher_map=0.0)
    trainer.train()
    assert "task_adaptive_features" in trainer.state.log_history[0]


@pytest.mark.parametrize(("given", "steps"), [("auto", 40), (7, 7), ("7", 7), (0, 0)])
def test_calibration_takes_auto_or_a_number_of_steps(tmp_path, given, steps):
    assert DistillationConfig(str(tmp_path), calibrate_weights=given).calibration_steps == steps


@pytest.mark.parametrize("given", ["soon", -1, "1.5"])
def test_other_lengths_of_a_calibration_are_refused(tmp_path, given):
    with pytest.raises(ValueError, match="calibrate_weights must be auto or a number of steps, at least 0, got"):
        DistillationConfig(str(tmp_path), calibrate_weights=given)
