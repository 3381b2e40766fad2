"""The trainer in one run: what is logged, what is trained at which rate, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback

from hf_detrkd import DistillationConfig, DistillationTrainer
from hf_detrkd.data import DetectionTransform
from tests import tiny
from tests.runs import assert_trained, make_trainer, weights_of


@pytest.mark.parametrize("method", ["kd_detr", "detrdistill"])
def test_bf16_trains_through_the_extra_decoder_passes(tmp_path: Path, askable: str, method: str) -> None:
    given = {"method": method, "bf16": True, "teacher_dtype": "bfloat16"}
    trainer = make_trainer(tmp_path, family=askable, max_gradient_ratio=0, **given)  # random teachers: loud features
    before = weights_of(trainer)
    trainer.train()
    assert_trained(before, weights_of(trainer))
    assert all(torch.isfinite(value).all() for value in weights_of(trainer).values())
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "grad_norm" in entry)


@pytest.mark.parametrize("method", ["kd_detr", "detrdistill", "clockdistill"])
def test_every_term_is_logged_by_name_and_the_loss_is_their_weighted_sum(tmp_path: Path, method: str) -> None:
    trainer = make_trainer(tmp_path, method=method, distillation_weight=0.5)
    trainer.train()
    entry = trainer.state.log_history[0]
    weights = trainer.distiller.loss_weights
    for part in weights:
        assert any(key.startswith(part) and value > 0 for key, value in entry.items()), part
    logged = {key: value for key, value in entry.items() if key.startswith(method)}
    terms = sum(weights[max(filter(key.startswith, weights), key=len)] * value for key, value in logged.items())
    assert entry["distillation_loss"] == pytest.approx(terms, rel=1e-5)
    assert entry["loss"] == pytest.approx(entry["task_loss"] + 0.5 * terms, rel=1e-5)
    assert {
        "learning_rate",
        "images_per_second",
        "peak_memory_gb",
        "task_class",
        "task_box",
        "task_giou",
    } <= entry.keys()


def test_the_teacher_is_bit_identical_after_training_and_outside_everything(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, method="kd_detr")
    teacher = trainer.distiller.teacher.model
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = weights_of(trainer)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training
    own = {id(p) for p in teacher.parameters()}
    assert not own & {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert_trained(student, weights_of(trainer))


def test_the_backbone_has_its_own_learning_rate(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, learning_rate=1e-3, backbone_learning_rate=1e-5, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    backbone = {id(p) for name, p in trainer.student.named_parameters() if name.startswith("model.backbone.")}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[key] for key in backbone} == {1e-5}
    assert {rate for key, rate in rates.items() if key not in backbone} == {1e-3}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(trainer.student.parameters()))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


def test_parameters_learn_at_the_factor_of_the_first_expression_that_matches(tmp_path: Path) -> None:
    factors = {"sampling_offsets|reference_points": 0.1, r"decoder\.": 0.5}
    for given in (factors, json.dumps(factors)):
        options = {"family": "deformable_detr/two_stage", "learning_rate": 1e-3, "backbone_learning_rate": 1e-5}
        trainer = make_trainer(tmp_path, **options, weight_decay=0.1, learning_rate_factors=given)
        groups = trainer.create_optimizer().param_groups
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        for name, parameter in trainer.student.named_parameters():
            slow = 1e-5 if "backbone" in name else 5e-4 if "decoder." in name else 1e-3
            assert rates[id(parameter)] == pytest.approx(1e-4 if "sampling_offsets" in name else slow), name
        assert sum(len(group["params"]) for group in groups) == len(rates)
    with pytest.raises(ValueError, match="none has 'no such'"):
        make_trainer(tmp_path, learning_rate_factors={"no such": 0.1}).create_optimizer()
    with pytest.raises(ValueError, match="learning_rate_factors must be a JSON object of names and finite numbers"):
        DistillationConfig(str(tmp_path), learning_rate_factors="0.1")


def test_freezing_is_what_the_patterns_say_whatever_transformers_froze(tmp_path: Path) -> None:
    assert not any(p.requires_grad for p in tiny.build("detr").model.backbone.parameters())
    trainer = make_trainer(tmp_path, family="detr", freeze=[r"backbone.*stages\.0", r"^class_labels"])
    names = [name for name, _ in trainer.student.named_parameters()]
    wanted = {n for n in names if ("backbone" in n and "stages.0" in n) or n.startswith("class_labels")}
    assert {name for name, p in trainer.student.named_parameters() if not p.requires_grad} == wanted
    with pytest.raises(ValueError, match=r"freeze pattern 'no such' matches no parameter"):
        make_trainer(tmp_path, freeze=["no such"])


def test_early_stopping_and_augmentation_by_epoch_work_as_in_trainer(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        images=4,
        augment=True,
        max_steps=-1,
        num_train_epochs=5,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        learning_rate=0.0,
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    seen = []
    original = DetectionTransform.__call__

    def spy(self: DetectionTransform, image: object, record: object, seed: int) -> object:
        if self.augmentation is not None:
            seen.append(seed)
        return original(self, image, record, seed)

    DetectionTransform.__call__ = spy
    try:
        trainer.train()
    finally:
        DetectionTransform.__call__ = original
    assert trainer.state.epoch == 2  # the learning rate is 0: the second epoch is no better than the first
    assert len(seen) == len(set(seen)) == 8  # every epoch shows every image in another way


def test_the_teacher_can_be_evaluated_before_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, method="kd_detr")
    own = make_trainer(tmp_path)
    own.student.load_state_dict(trainer.distiller.teacher.model.state_dict())
    wanted = {k.replace("eval_", "teacher_"): v for k, v in own.evaluate().items() if "map" in k}
    found = trainer.evaluate_teacher()
    assert {k: found[k] for k in wanted} == pytest.approx(wanted, abs=1e-6)


def test_arguments_that_cannot_work_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"must be none or a comma-separated list of clockdistill, detrdistill, .* got 'kd-detr'",
    ):
        DistillationConfig(str(tmp_path), method="kd-detr")
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
        DistillationConfig(str(tmp_path), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="remove_unused_columns must be false"):
        DistillationConfig(str(tmp_path), remove_unused_columns=True)
    with pytest.raises(ValueError, match="teacher_dtype must be float32, bfloat16 or float16"):
        DistillationConfig(str(tmp_path), teacher_dtype="int8")
    with pytest.raises(ValueError, match="--method kd_detr needs a teacher"):
        DistillationTrainer(tiny.build("detr"), DistillationConfig(str(tmp_path), method="kd_detr", use_cpu=True))
    with pytest.raises(ValueError, match="teacher_model is set, but no method uses it"):
        DistillationTrainer(tiny.build("detr"), DistillationConfig(str(tmp_path), use_cpu=True), tiny.build("detr"))


@pytest.mark.parametrize("name", ["d_fine", "deimv2"])
def test_the_bins_of_d_fine_are_constants(tmp_path: Path, name: str) -> None:
    trainer = make_trainer(tmp_path, family=name)
    before = [parameter.clone() for n, parameter in bins_of(trainer)]
    trainer.train()
    assert len(before) == 2
    assert all(torch.equal(was, now) for was, (_, now) in zip(before, bins_of(trainer), strict=True))


def bins_of(trainer: DistillationTrainer) -> list[tuple[str, torch.Tensor]]:
    return [(n, p) for n, p in trainer.student.named_parameters() if n.endswith(("decoder.up", "decoder.reg_scale"))]


def test_distillation_follows_its_schedule_and_ends(tmp_path: Path) -> None:
    arguments = {"distillation_schedule": "linear", "distillation_stop": 0.5, "max_steps": 4, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, family="detr", method="kd_detr", **arguments)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    shares = [(entry["loss"] - entry["task_loss"]) / entry.get("distillation_loss", 1.0) for entry in log]
    assert shares == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-3)
    assert ["distillation_loss" in entry for entry in log] == [True, True, False, False]


def test_each_method_follows_its_own_schedule_unless_one_is_chosen(tmp_path: Path) -> None:
    arguments = {"method": "task_adaptive,kd_detr", "max_steps": 4, "learning_rate": 0.0, "family": "detr"}
    trainer = make_trainer(tmp_path, **arguments)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    weights = trainer.distiller.loss_weights
    for entry, factor in zip(log, (1.0, 0.75, 0.5, 0.25), strict=True):
        feature = weights["task_adaptive_features"] * entry["task_adaptive_features"]
        others = entry["distillation_loss"] - feature
        assert feature > 0 and others > 0
        assert entry["loss"] - entry["task_loss"] == pytest.approx(factor * feature + others, rel=1e-4)
    chosen = DistillationConfig(str(tmp_path), distillation_schedule="constant", method="task_adaptive")
    assert chosen.schedules()["task_adaptive"](3, 4) == 1.0


def test_one_class_weight_for_own_and_extra_queries(tmp_path: Path) -> None:
    for chosen, weight in ((None, 1.0), (2.0, 2.0)):
        options = {"family": "deformable_detr/two_stage", "method": "detrdistill,extra_queries"}
        trainer = make_trainer(tmp_path, **options, class_loss_weight=chosen)
        assert trainer.distiller.adapter.criterion.class_weight == weight
        weights = trainer.distiller.loss_weights
        assert weights["detrdistill_assignment_class"] == weights["extra_queries_class"] == weight
    with pytest.raises(ValueError, match="class_loss_weight is for losses of this package, but faster_rcnn computes"):
        make_trainer(tmp_path, family="faster_rcnn", class_loss_weight=2.0)
    with pytest.raises(ValueError, match="class_loss_weight must be above 0, got 0"):
        DistillationConfig(str(tmp_path), class_loss_weight=0.0)


def test_activation_checkpointing_is_the_student_s(tmp_path):
    trainer = make_trainer(tmp_path, family="detr", method="kd_detr", gradient_checkpointing=True)
    trainer.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.student.modules())
