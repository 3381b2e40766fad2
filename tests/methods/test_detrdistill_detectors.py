"""DETRDistill of real tiny detectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_detrkd.adapters import DetectorAdapter, adapter_for, spec_for
from hf_detrkd.distillation.teacher import Teacher
from hf_detrkd.methods import DETRDistill, DETRDistillConfig
from hf_detrkd.structures.targets import Targets
from tests import tiny
from tests.methods.detrdistill import VARIANTS, compare


def distil(
    student: DetectorAdapter, teacher: Teacher, boxes: Sequence[int] = (2, 0), padded: bool = False, **options: Any
) -> tuple[DETRDistill, dict[str, Tensor]]:
    inputs = tiny.batch(64, boxes=boxes, padded=padded)
    output, _ = student(inputs["pixel_values"], inputs.get("pixel_mask"))
    seen = teacher(inputs["pixel_values"], inputs.get("pixel_mask"))
    method = DETRDistill(DETRDistillConfig(**options), student.spec, teacher.spec)
    return method, compare(method, output, seen, Targets.from_labels(inputs["labels"]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_student_that_is_its_teacher_has_no_loss_in_answers_and_features(build, askable, variant):
    family = askable
    student, teacher = adapter_for(build(family)), Teacher(build(family), tiny.LABELS)
    _, losses = distil(student, teacher, variant=variant)
    compared = {name: value for name, value in losses.items() if "assignment" not in name}
    levels, terms = len(student.spec.features["neck"]), 5 if variant == "paper" else 3
    assert len(compared) == terms * tiny.NUM_LAYERS + levels
    assert all(abs(value) < 1e-6 for value in compared.values()), compared
    assert all(value > 1e-3 for name, value in losses.items() if name not in compared)


@pytest.mark.parametrize("place", ["neck", "encoder"])
def test_each_loss_reaches_the_backbone_and_the_projections(build, askable, place):
    family = askable
    model = build(family).requires_grad_(True)
    student, width = adapter_for(model), 32 if family in ("detr", "table-transformer") else 64
    teacher = Teacher(tiny.build(family, width, seed=1), tiny.LABELS)
    method, losses = distil(student, teacher, feature_level=place, padded=student.uses_pixel_mask)
    first = next(p for n, p in student.backbone_parameters() if n.endswith("weight") and p.ndim == 4)
    for name in method.weights:
        terms = torch.stack([value for key, value in losses.items() if key.startswith(name)])
        assert torch.autograd.grad(terms.sum(), first, retain_graph=True)[0].any(), name
    assert (width == 64) == any(True for _ in method.parameters())
    feature = sum(value for name, value in losses.items() if "feature" in name)
    assert all(g.any() for g in torch.autograd.grad(feature, list(method.parameters()))) if width == 64 else True


@pytest.mark.parametrize(
    ("teacher_name", "student_name"),
    [
        ("rt_detr", "deformable_detr/two_stage"),
        ("deformable_detr/two_stage", "rt_detr"),
        ("deformable_detr/two_stage", "deformable_detr/plain"),
        ("deformable_detr/plain", "deformable_detr/refine"),
    ],
)
def test_unlike_detectors_distil(build: Callable, teacher_name, student_name):
    teacher = Teacher(tiny.build(teacher_name, 64, seed=1, decoder_layers=2, num_queries=9), tiny.LABELS)
    _, losses = distil(adapter_for(build(student_name).requires_grad_(True)), teacher)
    assert all(value.isfinite() and value >= 0 for value in losses.values())


def test_a_softmax_student_learns_from_a_sigmoid_teacher_by_answers_and_features(build):
    teacher = Teacher(tiny.build("rt_detr", 64, seed=1), tiny.LABELS)
    _, losses = distil(adapter_for(build("detr")), teacher, assignment_weight=0.0)
    assert all(value.isfinite() and value >= 0 for value in losses.values())


@pytest.mark.parametrize("teacher", ["detr", "table-transformer"])
@pytest.mark.parametrize("student", tiny.FAMILIES)
def test_queries_of_a_detr_teacher_of_another_width_are_refused_and_the_other_losses_not(student, teacher):
    specs = spec_for(tiny.config(student)), spec_for(tiny.config(teacher, 64))
    message = (
        rf"A {student} student \(32 wide\) cannot decode the queries of a {teacher} teacher \(64 wide\): set "
        "assignment_weight to 0, or choose a teacher of the same family and width"
    )
    with pytest.raises(ValueError, match=message):
        DETRDistill(DETRDistillConfig(), *specs)
    DETRDistill(DETRDistillConfig(assignment_weight=0.0), *specs)
