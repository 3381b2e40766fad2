"""Weights of the losses: calibrated by the gradients, kept when a run resumes, and numbers by name."""

from __future__ import annotations

import pytest
import torch
import yaml

from hf_detrkd import DistillationConfig
from hf_detrkd.training.loss_probe import measure, untouched
from tests.runs import weights_of


def test_calibrated_terms_have_the_asked_share_of_the_gradient(make_run, tmp_path):
    trainer = make_run("kd_detr,clockdistill", calibrate_weights=1, calibration_fraction=0.2, learning_rate=1e-12)
    before = weights_of(trainer)
    trainer._calibrate_weights()
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())
    batch = next(trainer._random_batches(1))
    with untouched(trainer.distiller), torch.random.fork_rng():
        found = measure(trainer.distiller, batch, trainer._probe_precision, trainer.distiller.weight_key)
    shares = {term.name: term.gradient / found.task_gradient for term in found.terms}
    assert shares.keys() == trainer.distiller.loss_weights.keys()
    # The denoising queries of the task loss are drawn anew.
    assert all(0.1 < share < 0.4 for share in shares.values()), shares
    assert max(shares.values()) == pytest.approx(min(shares.values()), rel=1e-3)


def test_calibrated_weights_are_in_the_recipe_and_a_resumed_run_keeps_them(make_run, tmp_path):
    first = make_run(calibrate_weights=2, save_strategy="steps", save_steps=1)
    first.train()
    weights = first.distiller.loss_weights
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe == {"loss_weights": weights, "calibrate_weights": 0}
    assert weights != make_run().distiller.loss_weights
    resumed = make_run(calibrate_weights=2, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.distiller.loss_weights == weights


def test_a_resumed_run_keeps_calibrated_weights_unless_it_is_given_others(make_run, tmp_path):
    first = make_run(calibrate_weights=1, save_strategy="steps", save_steps=1)
    first.train()
    kept, given = make_run(max_steps=3), make_run(max_steps=3, loss_weights={"kd_detr_box": 7.0})
    for resumed in (kept, given):
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert kept.distiller.loss_weights == first.distiller.loss_weights
    assert given.distiller.loss_weights == {"kd_detr_class": 2.0, "kd_detr_box": 7.0, "kd_detr_giou": 2.0}


def test_a_resumed_run_keeps_weights_that_were_calibrated_from_given_ones(make_run, tmp_path):
    given = {"calibrate_weights": 1, "loss_weights": {"kd_detr_giou": 0.0}}
    first = make_run(save_strategy="steps", save_steps=1, **given)
    first.train()
    resumed = make_run(max_steps=3, **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.distiller.loss_weights == first.distiller.loss_weights


@pytest.mark.parametrize("unused", ["kd_detr", "kd_detr_class"])
def test_a_key_that_no_term_uses_is_not_calibrated(make_run, unused):
    given = {"kd_detr": 0.5, "kd_detr_class_general": 1.0, "kd_detr_class_specific": 1.0}
    trainer = make_run("kd_detr", calibrate_weights=1, loss_weights=given)
    trainer._calibrate_weights()
    before = {"kd_detr": 0.5, "kd_detr_class": 0.5, "kd_detr_box": 0.5}
    assert trainer.distiller.loss_weights[unused] == before[unused]
    assert trainer.distiller.loss_weights["kd_detr_box"] != before["kd_detr_box"]


def test_calibration_without_clipping_trains_the_student(make_run):
    weights = []
    for norm in (0.0, 1e9, 1e-9):
        trainer = make_run(calibrate_weights=2, max_grad_norm=norm, learning_rate=1e-2)
        torch.manual_seed(0)
        trainer._calibrate_weights()
        weights.append(trainer.distiller.loss_weights)
    assert weights[0] == weights[1] != weights[2]


def test_a_weight_of_zero_stays_zero(make_run):
    trainer = make_run(calibrate_weights=1, loss_weights={"kd_detr_giou": 0.0})
    trainer.train()
    assert trainer.distiller.loss_weights["kd_detr_giou"] == 0.0
    assert trainer.distiller.loss_weights["kd_detr_box"] != 5.0


@pytest.mark.parametrize("weights", ["{a: 1}", '["kd_detr_box"]', {"kd_detr_box": None}, {"kd_detr_box": "much"}])
def test_loss_weights_that_are_no_numbers_by_name_are_refused(tmp_path, weights):
    with pytest.raises(ValueError, match="loss_weights must be a JSON object of names and finite numbers, got"):
        DistillationConfig(str(tmp_path), loss_weights=weights)


def test_loss_weights_of_yaml_are_numbers(tmp_path):
    """YAML 1.1 reads 1e-3 as text."""
    weights = yaml.safe_load("{kd_detr_box: 1e-3}")
    assert DistillationConfig(str(tmp_path), loss_weights=weights).loss_weights == {"kd_detr_box": 0.001}
    assert DistillationConfig(str(tmp_path), method=["kd_detr", "clockdistill"]).methods == ["kd_detr", "clockdistill"]
