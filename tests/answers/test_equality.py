"""A training step with stored answers equals one with the teacher, for every method that can use them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_detrkd.distillation.answering import Answering
from hf_detrkd.distillation.distiller import Distiller
from hf_detrkd.distillation.stored_teacher import StoredTeacher
from hf_detrkd.structures.loss_key import LossKey
from tests.answers.stored import CLASSES, COLLATE, SEED, VIEWS, build, dataset, methods_of, stored, teacher_of


Step = tuple[dict[LossKey, Tensor], dict[str, Tensor]]
POINTS = {"general_points": 7}
CASES = {
    "KD-DETR": {"kd_detr": POINTS},
    "KD-DETR, zero content": {"kd_detr": POINTS | {"content": "zero"}},
    "KD-DETR, each layer": {"kd_detr": POINTS | {"teacher_layers": "each", "class_loss": "bce", "gate": "better"}},
    "DETRDistill": {"detrdistill": {}},
    "DETRDistill, released": {"detrdistill": {"variant": "released", "feature_level": "encoder"}},
    "DETRDistill, logits": {"detrdistill": {"feature_weight": 0.0, "assignment_weight": 0.0}},
    "CLoCKDistill": {"clockdistill": {}},
    "CLoCKDistill, class content": {"clockdistill": {"class_content": True, "memory_weight": 0.0}},
    "two methods": {"kd_detr": POINTS, "clockdistill": {"gate": "better"}},
}
FAMILIES = ("rt_detr", "deformable_detr/two_stage", "deformable_detr/plain", "dab-detr", "dino_detr")


def step_of(student: Any, teacher: Any, methods: Any, batch: dict[str, Any], view: int) -> Step:
    """Losses and gradients of one batch; a teacher that is there is asked the points of the view."""
    student = copy.deepcopy(student).requires_grad_(True)
    distiller = Distiller(student, teacher, copy.deepcopy(methods), seed=SEED)
    distiller.training = True  # the methods run, and nothing in the student is random
    losses = distiller.losses(batch, step=view)
    total = torch.stack(list(distiller.weighted(losses.distillation).values())).sum()
    total.backward()
    gradients = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    return {key: value.detach() for key, value in losses.distillation.items()}, gradients


def both_steps(folder: Path, family: str, options: dict[str, Any], precision: str) -> tuple[Step, Step]:
    student, data = build(family), dataset()
    teacher = teacher_of(family)
    methods = methods_of(student, teacher, **options)
    answers = stored(folder, teacher, methods, data, precision)
    there = StoredTeacher(answers, CLASSES)
    read = data.with_answers(answers)
    view = VIEWS - 1
    batch = COLLATE([read.view_of(index, view) for index in (3, 0, 4)])
    assert any(name.startswith("answers/") for name in batch)
    return step_of(student, teacher, methods, batch, view), step_of(student, there, methods, batch, view)


def compare(live: Step, read: Step, tolerance: float) -> None:
    for found, wanted in zip(read, live, strict=True):
        assert found.keys() == wanted.keys() and found
        largest = max(float(value.abs().max()) for value in wanted.values())
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * largest, msg=str(name))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_equal_those_with_the_teacher(case: str, family: str, tmp_path: Path) -> None:
    compare(*both_steps(tmp_path, family, CASES[case], "float32"), tolerance=1e-5)


@pytest.mark.parametrize("case", ["KD-DETR", "DETRDistill, logits", "CLoCKDistill"])
def test_half_precision_changes_them_by_less_than_two_per_mille(case: str, tmp_path: Path) -> None:
    compare(*both_steps(tmp_path, "rt_detr", CASES[case], "float16"), tolerance=2e-3)


def test_the_teacher_s_classes_are_matched_when_they_are_read(tmp_path: Path) -> None:
    """Answers have the teacher's own classes, so that students with others can use them."""
    names = ["moon", *reversed(CLASSES[1:])]
    student = build("rt_detr", names)
    plain, data = teacher_of("rt_detr"), dataset()
    methods = methods_of(student, plain, kd_detr=POINTS)
    answers = stored(tmp_path, plain, methods, data)
    batch = COLLATE([data.with_answers(answers).view_of(index, 1) for index in (1, 2)])
    live = step_of(student, teacher_of("rt_detr", names), methods, batch, 1)
    compare(live, step_of(student, StoredTeacher(answers, names), methods, batch, 1), tolerance=1e-5)


def test_images_without_boxes_have_answers(tmp_path: Path) -> None:
    student, teacher, data = build("rt_detr"), teacher_of("rt_detr"), dataset(min_visible=1.0)
    methods = methods_of(student, teacher, clockdistill={})
    answers = stored(tmp_path, teacher, methods, data)
    batch = COLLATE([data.with_answers(answers).view_of(0, 0)])
    for label in batch["labels"]:
        label |= {"class_labels": label["class_labels"][:0], "boxes": label["boxes"][:0]}
    for name in list(batch):
        if "targets" in name:
            batch[name] = torch.zeros_like(batch[name][:, :1])
    losses, _ = step_of(student, StoredTeacher(answers, CLASSES), methods, batch, 0)
    assert all(value == 0 for key, value in losses.items() if key.part != "background"), losses


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("faster_rcnn", {"kd_detr": {"proposal_targets": "asked"}}, "asks the teacher at the student's own proposals"),
        ("faster_rcnn", {"task_adaptive": {}}, "asks the teacher at the student's own proposals"),
    ],
)
def test_methods_that_ask_what_only_the_training_knows_are_refused(family: str, options: Any, words: str) -> None:
    teacher = teacher_of("rt_detr")
    with pytest.raises(ValueError, match=words):
        Answering(teacher, methods_of(build(family), teacher, **options), SEED, padded=False)
