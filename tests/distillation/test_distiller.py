"""The module that is trained: the sum of its losses, what the method is given, and what eval mode leaves out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_detrkd.distillation.distiller import Distiller
from hf_detrkd.distillation.teacher import Teacher
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import tiny
from tests.distillation.distillers import Stub, distiller_of


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_loss_is_the_task_loss_plus_the_weighted_sum(build, family, weight):
    distiller, method = distiller_of(build, family)
    inputs = tiny.batch(64)
    torch.manual_seed(0)  # denoising draws random numbers
    found = distiller(inputs, distillation_weights={"stub": weight})
    targets = Targets.from_labels(inputs["labels"])
    torch.manual_seed(0)
    student, task = distiller.adapter(inputs["pixel_values"], None, targets)
    mean = student.layers[-1].boxes.mean()
    weighted = 2.0 * (3 + 2 * mean) + 0.5 * (30 + 100)
    torch.testing.assert_close(found["loss"], student.loss + weight * weighted)
    torch.testing.assert_close(found["loss"] - weight * weighted, sum(task.values()), atol=1e-4, rtol=1e-4)
    found["loss"].backward()
    torch.testing.assert_close(method.scale.grad, torch.tensor(weight * (2.0 + 0.5 * 10)))


def test_without_weight_neither_teacher_nor_method_is_asked(build):
    distiller, method = distiller_of(build)
    asked: list[int] = []
    distiller.teacher.model.register_forward_hook(lambda *_: asked.append(1))
    distiller.teacher.model.model.register_forward_hook(lambda *_: asked.append(1))
    found = distiller(tiny.batch(64), distillation_weights={"stub": 0.0})
    assert not asked and not method.calls
    assert all(name.startswith("task_") for name in found["parts"])


def test_parts_are_detached_and_named_with_layers_summed(build):
    distiller, _ = distiller_of(build)
    found = distiller(tiny.batch(64))
    parts = found["parts"]
    task = {name for name in parts if name.startswith("task_")} - {"task_loss"}
    expected = {"task_loss", "distillation_loss", "stub_one", "stub_two_left", "stub_two_right"}
    assert parts.keys() - task == expected and task
    assert all(value.ndim == 0 and not value.requires_grad for value in parts.values())
    mean = found["pred_boxes"].mean()
    torch.testing.assert_close(parts["stub_one"], 3 + 2 * mean.detach())
    torch.testing.assert_close(parts["task_loss"], sum(parts[name] for name in task))
    torch.testing.assert_close(found["loss"].detach(), parts["task_loss"] + parts["distillation_loss"])
    assert found["loss"].requires_grad


def test_the_method_gets_both_passes_the_truth_and_its_divisors(build):
    distiller, method = distiller_of(build)
    inputs = tiny.batch(64, boxes=(9, 0, 2))
    distiller(inputs)
    (call,) = method.calls
    assert call["totals"] == BatchTotals(3.0, 11.0, 9.0, 2.0)  # 7 queries hold 7 of the 9 boxes
    assert call["targets"].counts == (9, 0, 2)
    wanted = distiller.teacher(inputs["pixel_values"]).layers[-1]
    torch.testing.assert_close(call["teacher"].layers[-1].logits, wanted.logits)
    assert call["student"].layers[-1].logits.requires_grad and not call["teacher"].layers[-1].logits.requires_grad


def test_totals_of_the_whole_batch_replace_those_of_this_process(build):
    distiller, method = distiller_of(build)
    inputs = tiny.batch(64)
    alone = distiller(inputs)["parts"]
    shared = distiller(inputs | {"totals": torch.tensor([[4.0, 6.0, 6.0, 3.0, 0.5]] * 2)})[
        "parts"
    ]  # this process: 2, 3, 3
    totals = method.calls[1]["totals"]
    counts = (totals.images, totals.boxes, totals.matched, totals.occupied, totals.share)
    assert [float(count) for count in counts] == [4.0, 6.0, 6.0, 3.0, 0.5]
    torch.testing.assert_close(shared["task_loss"], alone["task_loss"] / 2)


def test_a_method_without_a_teacher_and_the_reverse_are_refused(build):
    message = "Distillation needs a teacher and a method: give both, or neither for plain training"
    for pair in ({"methods": [Stub()]}, {"teacher": Teacher(build("detr"), tiny.LABELS)}):
        with pytest.raises(ValueError, match=message):
            Distiller(build("detr"), **pair)


@pytest.mark.parametrize("labelled", [False, True])
def test_in_eval_mode_it_is_the_student_and_no_teacher_is_called(build, family, labelled):
    distiller, method = distiller_of(build, family)
    distiller.eval()
    calls: list[int] = []
    distiller.teacher.adapter.body.register_forward_hook(lambda *_: calls.append(1))
    inputs = tiny.batch(64, padded=distiller.adapter.uses_pixel_mask)
    expected = distiller.student(**inputs)
    found = distiller(inputs if labelled else {k: v for k, v in inputs.items() if k != "labels"})
    torch.testing.assert_close(found["logits"], expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, atol=1e-5, rtol=1e-5)
    assert not calls and not method.calls
    assert not any(name.startswith(("stub", "distillation")) for name in found["parts"])
    if labelled:
        torch.testing.assert_close(found["loss"], found["parts"]["task_loss"])
    else:
        assert found["loss"] is None and found["parts"] == {}


def test_without_a_method_it_is_plain_training(build):
    distiller = Distiller(build("detr").requires_grad_(True)).train()
    found = distiller(tiny.batch(64))
    assert all(name.startswith("task_") for name in found["parts"])
    torch.testing.assert_close(found["loss"].detach(), found["parts"]["task_loss"])
    found["loss"].backward()
    assert any(parameter.grad is not None for parameter in distiller.student.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norm_keeps_its_statistics_and_live_batch_norm_does_not(build, frozen):
    student, part = build("rt_detr").requires_grad_(True), "model.encoder_input_proj."
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(part)))
    layers = {name: module for name, module in student.named_modules() if isinstance(module, nn.BatchNorm2d)}
    before = {name: layer.running_mean.clone() for name, layer in layers.items()}
    distiller = Distiller(student).train()
    distiller(tiny.batch(64))["loss"].backward()
    kept = {name for name, layer in layers.items() if torch.equal(layer.running_mean, before[name])}
    chosen = {name for name in layers if name.startswith(part)}
    assert chosen and chosen < layers.keys()
    assert kept == (chosen if frozen else set())
    assert student.training and not any(module.training for module in distiller.eval().modules())


def test_the_student_s_config_is_its_own(build):
    distiller, _ = distiller_of(build)
    assert distiller.config is distiller.student.config
