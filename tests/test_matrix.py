"""Every teacher with every student: one training step of all that the pair can do, and refusals of what it cannot."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from hf_detrkd.adapters import adapter_for
from hf_detrkd.distillation.distiller import Distiller
from hf_detrkd.distillation.teacher import Teacher
from hf_detrkd.methods import METHODS, DistillationMethod
from hf_detrkd.structures.outputs import DetectorSpec
from tests import script, tiny


support_table = script("support_table")
OPTIONS = {
    "detrdistill": {"L": "logits_weight", "F": "feature_weight", "A": "assignment_weight"},
    "kd_detr": {"S": "specific_points", "G": "general_points"},
    "clockdistill": {"M": "memory_weight", "Q": "target_queries_weight"},
    "task_adaptive": {"N": "", "R": "proposals"},
}
OFF = {"specific_points": False, "general_points": 0, "proposals": False}


@functools.cache
def teacher_of(family: str) -> Teacher:
    return Teacher(tiny.build(family, 64, seed=3), tiny.LABELS)


def methods_of(student: DetectorSpec, teacher: DetectorSpec) -> list[DistillationMethod]:
    """Each method with all that this pair can do."""
    possible = support_table.possible(student, teacher)
    found = []
    for name, options in OPTIONS.items():
        chosen = {
            option: (10 if option == "general_points" else 1) for key, option in options.items() if key in possible
        }
        others = {option: OFF.get(option, 0) for option in options.values() if option not in chosen}
        if chosen:
            chosen.pop("", None)  # always on
            found.append(METHODS[name](METHODS[name].config_class(**chosen, **others), student, teacher))
    return found


def assert_a_step_trains(student_family: str, teacher_family: str) -> None:
    teacher = teacher_of(teacher_family)
    before = [tensor.clone() for tensor in (*teacher.model.parameters(), *teacher.model.buffers())]
    student = tiny.build(student_family, 32, seed=4).requires_grad_(True)
    methods = methods_of(adapter_for(student).spec, teacher.spec)
    assert methods
    for method in methods:
        distiller = Distiller(copy.deepcopy(student), teacher, [method]).train()
        optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-4)
        output = distiller(tiny.batch(64, boxes=(2, 3)))
        parts = {name: value for name, value in output["parts"].items() if name.startswith(method.name)}
        assert parts and all(value.isfinite() for value in output["parts"].values()), parts
        (output["loss"] - output["parts"]["task_loss"]).backward(retain_graph=True)
        assert all(p.grad is None or p.grad.isfinite().all() for p in distiller.parameters())
        output["loss"].backward()
        optimizer.step()
        pairs = zip(distiller.student.named_parameters(), student.parameters(), strict=True)
        moved = [name for (name, now), was in pairs if not torch.equal(now, was)]
        assert any("backbone" in n or "conv_encoder" in n or "vit." in n for n in moved)
    after = (*teacher.model.parameters(), *teacher.model.buffers())
    assert all(torch.equal(now, was) for now, was in zip(after, before, strict=True))


@pytest.mark.parametrize("detector", tiny.DETECTORS)
def test_a_wider_teacher_of_its_own_family_trains_a_student(detector: str) -> None:
    assert_a_step_trains(detector, detector)


@pytest.mark.parametrize("pair", [("faster_rcnn", "dino_detr"), ("rt_detr", "faster_rcnn")])
def test_detectors_of_proposals_and_of_queries_teach_each_other(pair: tuple[str, str]) -> None:
    assert_a_step_trains(*pair)


@pytest.mark.slow
@pytest.mark.parametrize("detector", tiny.DETECTORS)
@pytest.mark.parametrize("teacher", tiny.DETECTORS)
def test_every_teacher_trains_every_student(detector: str, teacher: str) -> None:
    assert_a_step_trains(detector, teacher)


@pytest.mark.parametrize("detector", tiny.DETECTORS)
def test_what_a_pair_cannot_do_is_refused_with_what_to_do(detector: str) -> None:
    student = adapter_for(tiny.build(detector)).spec
    refused = 0
    for teacher in map(teacher_of, tiny.DETECTORS):
        possible = support_table.possible(student, teacher.spec)
        for letter, (method, config) in support_table.PARTS.items():
            if letter not in possible and not (letter == "R" and student.one_to_one):  # R is then left out
                refused += 1
                with pytest.raises(ValueError, match=rf"{teacher.spec.family}.*(set|choose) ") as error:
                    method(config, student, teacher.spec)
                assert student.family in str(error.value)
    assert refused
