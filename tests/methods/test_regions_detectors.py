"""Steps of a real student that looks at proposals and DINO, both ways."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from hf_detrkd.adapters import adapter_for
from hf_detrkd.distillation.distiller import Distiller
from hf_detrkd.distillation.teacher import Teacher
from hf_detrkd.methods import METHODS
from tests import tiny
from tests.methods.regions import PARTS


RCNN = (
    "backbone.body.",
    "backbone.fpn.",
    "roi_heads.box_head.",
    "roi_heads.box_predictor.cls_score.",
    "roi_heads.box_predictor.bbox_pred.",
)
DINO = ("model.backbone.", "model.input_proj.", "model.encoder.", "model.decoder.")


def detector(family: str) -> transformers.PreTrainedModel:
    """Faster R-CNN as its config makes it, whose scores are not yet all 0 or 1."""
    if family == "faster_rcnn":
        return transformers.AutoModelForObjectDetection.from_config(tiny.config(family))
    return tiny.build(family)


def step(student: str, teacher: str, method: str, padded: bool, **options: Any) -> tuple[dict[str, Any], Any]:
    """A pass in training, and the gradients of the distillation alone by parameter."""
    model, frozen = detector(student).requires_grad_(True), Teacher(detector(teacher), tiny.LABELS)
    if teacher == "dino_detr":
        for parameter in frozen.model.model.decoder.bbox_embed[0].layers[-1].parameters():
            parameter.mul_(0.05)  # it moves boxes a little, and so now and then does better
    before = {name: tensor.clone() for name, tensor in frozen.model.state_dict().items()}
    config = METHODS[method].config_class(**options)
    distiller = Distiller(model, frozen, [METHODS[method](config, adapter_for(model).spec, frozen.spec)]).train()
    images = tiny.batch(96, padded=padded, boxes=(24, 23))
    torch.manual_seed(0)
    output = distiller(images)
    torch.manual_seed(0)
    losses = distiller.losses(images)
    names, parameters = zip(*distiller.named_parameters(), strict=True)
    found = torch.autograd.grad(sum(distiller.weighted(losses.distillation).values()), parameters, allow_unused=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.model.state_dict().items())
    return output, {name.removeprefix("student."): g for name, g in zip(names, found, strict=True) if g is not None}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("student", "teacher", "method", "options", "reached"),
    [
        ("faster_rcnn", "dino_detr", "kd_detr", {"general_points": 20, "proposal_targets": "asked"}, RCNN),
        ("faster_rcnn", "dino_detr", "task_adaptive", {"class_gate": "foreground"}, RCNN),
        ("dino_detr", "faster_rcnn", "kd_detr", {"general_points": 20}, DINO),
        ("dino_detr", "faster_rcnn", "task_adaptive", {}, DINO[:2]),
    ],
    ids=["boxes by queries", "proposals by queries", "queries by boxes", "features alone"],
)
def test_a_step_is_finite_and_reaches_all_but_the_proposals(student, teacher, method, options, reached, padded):
    output, gradients = step(student, teacher, method, padded, **options)
    parts = output["parts"]
    assert all(value.isfinite() for value in parts.values()), parts
    compared = {name: value for name, value in parts.items() if name.startswith(method) and "pass" not in name}
    groups = ("_specific", "_general") if method == "kd_detr" else ("",)
    kinds = PARTS if method == "kd_detr" else ("features", "class", "box")[: 1 if student == "dino_detr" else 3]
    assert compared.keys() == {f"{method}_{kind}{group}" for kind in kinds for group in groups}
    assert all(value > 0 for value in compared.values()), compared
    for prefix in reached:
        assert any(g.any() for name, g in gradients.items() if name.startswith(prefix)), prefix
    assert all(g.isfinite().all() for g in gradients.values())
    assert not any(g.any() for name, g in gradients.items() if name.startswith("rpn."))


def test_pass_rates_are_logged_and_are_no_losses():
    output, _ = step("faster_rcnn", "dino_detr", "task_adaptive", False)
    parts, rates = output["parts"], {"task_adaptive_class_pass", "task_adaptive_box_pass"}
    assert rates < parts.keys() and not rates & output["terms"].keys()
    assert all(0 <= parts[name] <= 1 and not parts[name].requires_grad for name in rates)
    distances = [parts[f"task_adaptive_{part}"] for part in ("features", "class", "box")]
    torch.testing.assert_close(parts["distillation_loss"], sum(distances))
    torch.testing.assert_close(output["loss"].detach(), parts["task_loss"] + parts["distillation_loss"])


@pytest.mark.parametrize(
    ("method", "options"),
    [("kd_detr", {"general_points": 20}), ("task_adaptive", {"class_gate": "foreground"}), ("task_adaptive", {})],
    ids=["points", "proposals", "better proposals"],
)
def test_a_real_student_that_is_its_teacher_has_no_loss(method, options):
    model = transformers.AutoModelForObjectDetection.from_config(tiny.config("faster_rcnn", frozen_batch_norm=True))
    frozen, config = Teacher(copy.deepcopy(model), tiny.LABELS), METHODS[method].config_class(**options)
    distiller = Distiller(model, frozen, [METHODS[method](config, frozen.spec, frozen.spec)]).train()
    losses = distiller.losses(tiny.batch(96, padded=True, boxes=(6, 5))).distillation
    # Proposals pass from pixels to [0, 1] and back before the teacher is asked.
    exact = {name for name in losses if method == "kd_detr" or "features" in name}
    assert exact and all(abs(value) <= (0 if name in exact else 1e-5) for name, value in losses.items()), losses
