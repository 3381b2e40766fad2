"""The probe of every term's gradient: it changes nothing, and stops a run whose terms teach nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_detrkd.structures.outputs import Predictions
from tests.runs import weights_of
from tests.training.guards.runs import broken


def test_the_probe_prints_every_term_and_changes_nothing(make_run, capsys):
    plain, probed = make_run(probe=False), make_run("kd_detr")
    for trainer in (plain, probed):
        torch.manual_seed(1)
        trainer.train()
    printed = capsys.readouterr().out
    assert "kd_detr_giou_general" in printed
    assert "gradient" in printed
    for name, value in weights_of(plain).items():
        assert torch.equal(value, weights_of(probed)[name]), name
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, probed)]
    assert losses[0] == losses[1]


def test_a_nan_teacher_is_found_by_the_probe(make_run):
    trainer = make_run(min_teacher_map=0)
    broken(trainer)
    with pytest.raises(ValueError, match="kd_detr_class_specific is nan"):
        trainer.train()


def test_weights_that_are_all_zero_stop_the_run_and_single_ones_do_not(make_run):
    make_run(loss_weights={"kd_detr_class": 0.0}).train()
    with pytest.raises(ValueError, match="every term is given the weight 0"):
        make_run(loss_weights={"kd_detr_": 0.0}).train()


def test_a_term_that_sends_no_gradient_to_the_student_stops_the_run(make_run):
    """Everything that the encoder's memory depends on is frozen: the memory can be compared, and not improved."""
    trainer = make_run("clockdistill")
    for name, parameter in trainer.student.named_parameters():
        parameter.requires_grad_("decoder." in name)
    with pytest.raises(ValueError, match="clockdistill_foreground is without gradient to the student"):
        trainer.train()


def test_a_term_of_more_than_ten_times_the_tasks_gradient_stops_the_run(make_run):
    loud = {"kd_detr_class_specific": 1e6}
    with pytest.raises(ValueError, match=r"kd_detr_class_specific is too strong: .* --calibrate_weights auto"):
        make_run(loss_weights=loud).train()
    make_run(loss_weights=loud, max_gradient_ratio=0).train()
    make_run(loss_weights=loud, calibrate_weights=2).train()


def test_a_gate_that_lets_nothing_through_is_no_fault(make_run, monkeypatch):
    """A student that does better on every object of the first images still has something to learn later."""

    def nothing(student: Predictions, teacher: Predictions, config: Any, one_to_one: bool) -> Tensor:
        return 0 * (student.logits.sum() + student.boxes[..., 0].expand(3, -1, -1, -1))

    monkeypatch.setattr("hf_detrkd.methods.kd_detr.point_losses", nothing)
    trainer = make_run()
    with pytest.raises(ValueError, match="kd_detr_class_specific is zero; kd_detr_box_specific is zero"):
        trainer._preflight(resumes=False)  # of the same losses without a gate it is one
    object.__setattr__(trainer.distiller.methods["kd_detr"].config, "gate", "better")
    trainer._preflight(resumes=False)


def test_a_training_set_without_a_length_is_neither_probed_nor_calibrated(make_run, capsys):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

    trainer = make_run(calibrate_weights=1)
    weights = dict(trainer.distiller.loss_weights)
    trainer.train_dataset = Stream()
    trainer._preflight(resumes=False)
    assert trainer.distiller.loss_weights == weights
    assert "gradient" not in capsys.readouterr().out
