"""KD-DETR's losses against naive loops on random answers, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch

from hf_detrkd.adapters import spec_for
from hf_detrkd.methods import KDDETR, KDDETRConfig
from tests import each, tiny
from tests.methods import naive
from tests.methods.fakes import HEADS, Fake, by_image, spec
from tests.methods.kd_detr import TWO_STAGE, compare


# (batch, general points, queries of student and teacher, layers of both, classes)
SIZES = {
    "equal": (2, 4, 5, 5, 2, 2, 3),
    "teacher deeper and wider": (1, 3, 4, 6, 2, 4, 1),
    "student deeper": (3, 2, 6, 3, 3, 2, 5),
    "one of everything": (1, 1, 1, 1, 1, 1, 2),
}


def fakes(sizes: tuple[int, ...], student_head: str = "sigmoid", teacher_head: str = "sigmoid") -> tuple[Fake, Fake]:
    batch_size, _, student_queries, teacher_queries, student_layers, teacher_layers, classes = sizes
    student = spec(student_queries, student_layers, classes, student_head)
    teacher = spec(teacher_queries, teacher_layers, classes, teacher_head)
    return Fake(student, batch_size, trains=True), Fake(teacher, batch_size)


@each("sizes", SIZES.values())
@each("student_head", HEADS)
@each("teacher_head", HEADS)
@each("scale", ["normalized", "released"])
@each("class_loss", ["softmax_kl", "bce"])
def test_every_loss_equals_the_naive_computation(sizes, student_head, teacher_head, scale, class_loss):
    for foreground, layers, temperature in ((True, "last", 10.0), (False, "each", 2.5)):
        student, teacher = fakes(sizes, student_head, teacher_head)
        config = KDDETRConfig(
            general_points=sizes[1],
            scale=scale,
            class_loss=class_loss,
            foreground_weight=foreground,
            teacher_layers=layers,
            temperature=temperature,
        )
        losses = compare(KDDETR(config, student.spec, teacher.spec), student.output, teacher.output)
        # A softmax over the one class of a sigmoid head is constant: there the class term is that of bce.
        tempered = class_loss == "softmax_kl" and (sizes[-1] > 1 or student_head == "softmax")
        options = (scale == "released", tempered, foreground, layers == "last", temperature)
        specific = by_image(student.answered[0]), by_image(teacher.output.layers)
        general = by_image(student.answered[1]), by_image(teacher.answered[0])
        expected = {
            f"kd_detr_{part}_{group}_{layer}": value
            for group, answers in (("specific", specific), ("general", general))
            for (part, layer), value in naive.kd_detr(*answers, *options).items()
        }
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                losses[name].double(), value, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_weights_are_those_of_each_scale():
    weights = {
        scale: KDDETR(KDDETRConfig(scale=scale), spec(), spec()).weights for scale in ("normalized", "released")
    }
    assert weights == {
        "normalized": {"kd_detr_class": 2.0, "kd_detr_box": 5.0, "kd_detr_giou": 2.0},
        "released": {"kd_detr_class": 1.0, "kd_detr_box": 5.0, "kd_detr_giou": 2.0},
    }


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("foreground", [True, False])
def test_released_class_term_is_the_normalized_one_times_weights_over_classes(head, foreground):
    student, teacher = fakes((1, 5, 6, 6, 2, 2, 4), head, head)
    found = {}
    for scale in ("normalized", "released"):
        config = KDDETRConfig(general_points=0, scale=scale, foreground_weight=foreground)
        method = KDDETR(config, student.spec, teacher.spec)
        torch.manual_seed(1)  # of the answers to the specific points
        found[scale] = compare(method, student.output, teacher.output)
    weights = teacher.output.layers[-1].scores().amax(-1).sum() if foreground else 6
    for layer in range(2):
        name = f"kd_detr_class_specific_{layer}"
        torch.testing.assert_close(found["released"][name], found["normalized"][name] * weights / 4)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_of_the_class_term_is_that_of_the_teacher_first_divergence(head, temperature):
    """`T^2 KL(teacher || student)` has the gradient `T (p_student - p_teacher)`; no other order has."""
    student, teacher = fakes((2, 5, 6, 6, 2, 2, 4), head, head)
    config = KDDETRConfig(general_points=0, class_loss="softmax_kl", temperature=temperature)
    losses = compare(KDDETR(config, student.spec, teacher.spec), student.output, teacher.output)
    answered, wanted = student.answered[0][1], teacher.output.layers[1]
    (gradient,) = torch.autograd.grad(losses["kd_detr_class_specific_1"], answered.logits)
    weight = wanted.scores().amax(-1)
    weight = weight / weight.sum(-1, keepdim=True) / 2
    apart = (answered.logits / temperature).softmax(-1) - (wanted.logits / temperature).softmax(-1)
    torch.testing.assert_close(gradient, weight[..., None] * temperature * apart, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("scale", ["normalized", "released"])
def test_an_image_without_foreground_gives_finite_losses(scale):
    student, teacher = fakes((2, 5, 6, 6, 1, 1, 4))
    layer = teacher.output.layers[0]
    layer.logits[:] = -200.0
    losses = compare(KDDETR(KDDETRConfig(scale=scale), student.spec, teacher.spec), student.output, teacher.output)
    assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("student", tiny.FAMILIES)
def test_a_detr_teacher_of_another_width_is_refused(student):
    message = (
        "KD-DETR needs queries that both decoders understand, but a detr teacher (64 wide) and a "
        f"{student} student (32 wide) share none: choose a pair of one family and width, two families with boxes or "
        "reference points, or --method detrdistill."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        KDDETR(KDDETRConfig(), spec_for(tiny.config(student)), spec_for(tiny.config("detr", 64)))


@pytest.mark.parametrize("teacher", ["deformable_detr/plain", "deformable_detr/refine"])
@pytest.mark.parametrize("student", TWO_STAGE)
def test_a_teacher_of_points_has_no_specific_points_for_a_student_of_boxes(teacher, student):
    specs = spec_for(tiny.config(student)), spec_for(tiny.config(teacher))
    message = f"The teacher's queries are reference points without size, which a {teacher} teacher .* and a {student} "
    with pytest.raises(ValueError, match=message + ".* cannot share: set specific_points to false"):
        KDDETR(KDDETRConfig(), *specs)
    KDDETR(KDDETRConfig(specific_points=False), *specs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"general_points": 0, "specific_points": False},
            "needs points: set general_points above 0 or specific_points",
        ),
        ({"general_points": -1}, "general_points must be at least 0, got -1"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KDDETRConfig(**options)
