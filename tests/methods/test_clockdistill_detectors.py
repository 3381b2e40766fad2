"""CLoCKDistill of real tiny detectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_detrkd.adapters import ADAPTERS, DetectorAdapter, adapter_for
from hf_detrkd.distillation.teacher import Teacher
from hf_detrkd.methods import CLoCKDistill, CLoCKDistillConfig
from hf_detrkd.methods.clockdistill import target_queries
from hf_detrkd.structures.targets import Targets
from tests import tiny
from tests.methods.backward import gradients, total
from tests.methods.clockdistill import ONLY_MEMORY, PLACED, PLACELESS, compare


MASKING = tuple(name for name in tiny.FAMILIES if ADAPTERS[tiny.config(name).model_type].uses_pixel_mask)


def possible(name: str) -> dict[str, Any]:
    """Options that two detectors of a family allow."""
    return ONLY_MEMORY if name in PLACELESS else {}


def other(name: str, width: int = 32) -> Teacher:
    """A teacher of other weights than the student's."""
    return Teacher(tiny.build(name, width, seed=1), tiny.LABELS)


def distil(
    student: DetectorAdapter, teacher: Teacher, inputs: dict[str, Any], **options: Any
) -> tuple[CLoCKDistill, dict[str, Tensor]]:
    method = CLoCKDistill(CLoCKDistillConfig(**options), student.spec, teacher.spec)
    images = inputs["pixel_values"], inputs.get("pixel_mask")
    output = student(*images)[0]
    return method, compare(method, output, teacher(*images), Targets.from_labels(inputs["labels"]))


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("options", [{"content": "zero"}, {"content": "own", "class_loss": "bce"}], ids=str)
def test_a_student_that_is_its_teacher_has_no_loss(build, name, options):
    student, teacher = adapter_for(build(name).requires_grad_(True)), Teacher(build(name), tiny.LABELS)
    inputs = tiny.batch(64, boxes=(3, 1), padded=name in MASKING)
    _, losses = distil(student, teacher, inputs, **options, **possible(name))
    levels, layers = len(student.spec.features["encoder"]), student.spec.num_layers
    assert len(losses) == 2 * levels + (0 if name in PLACELESS else 3 * layers)
    for key, value in losses.items():
        assert value == 0 if "ground" in key else abs(value) < 1e-6, key
    _, apart = distil(student, other(name), inputs, **options, **possible(name))
    assert all(value > 1e-3 for key, value in apart.items() if key != "clockdistill_background_3"), apart


@torch.no_grad()
@pytest.mark.parametrize("name", PLACED)
def test_repeats_of_the_ground_truth_would_change_nothing(build, name):
    student, teacher = adapter_for(build(name)), other(name)
    inputs = tiny.batch(64, boxes=(3, 1))
    targets, images = Targets.from_labels(inputs["labels"]), (inputs["pixel_values"], inputs.get("pixel_mask"))
    method = CLoCKDistill(CLoCKDistillConfig(memory_weight=0.0), student.spec, teacher.spec)
    outputs = student(*images)[0], teacher(*images)
    once, thrice = (compare(method, *outputs, targets.repeated(times)) for times in (1, 3))
    for key, value in once.items():
        torch.testing.assert_close(thrice[key], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PLACED)
def test_a_student_that_is_its_teacher_has_no_loss_with_content_for_the_class(build, name):
    student, teacher = adapter_for(build(name).requires_grad_(True)), Teacher(build(name), tiny.LABELS)
    weights = [0.5, *[2.0] * (student.spec.num_layers - 1)]
    _, losses = distil(student, teacher, tiny.batch(64, boxes=(3, 1)), class_content=True, layer_weights=weights)
    assert all(abs(value) < 1e-6 for value in losses.values()), losses


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_each_loss_reaches_the_backbone_and_the_projections(build, name):
    student, width = adapter_for(build(name).requires_grad_(True)), 64
    inputs = tiny.batch(64, padded=name in MASKING)
    method, losses = distil(student, other(name, width), inputs, **possible(name))
    first = next(p for n, p in student.backbone_parameters() if n.endswith("weight") and p.ndim == 4)
    terms = {part: [v for n, v in losses.items() if n.startswith(part)] for part in method.weights}
    for part, values in terms.items():
        if values:
            found = torch.autograd.grad(torch.stack(values).sum(), first, retain_graph=True)[0]
            assert found.any() and found.isfinite().all(), part
    assert bool(terms["clockdistill_class"]) == (name not in PLACELESS)
    assert all(g.any() for g in torch.autograd.grad(total(losses), list(method.parameters())))


def quiet(model: nn.Module, training: bool) -> nn.Module:
    """In training mode, with statistics that no other image of the batch changes."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def one_of(inputs: dict[str, Any], image: int) -> dict[str, Any]:
    return {name: value[image : image + 1] for name, value in inputs.items()}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PLACED)
def test_an_image_counts_the_same_alone_and_beside_one_with_more_boxes(build, name, training):
    student, teacher = adapter_for(quiet(build(name), training)), other(name)
    inputs = tiny.batch(128, boxes=(2, 6, 0))  # a single cell of a single image has no GroupNorm
    together = distil(student, teacher, inputs)[1]
    alone = [distil(student, teacher, one_of(inputs, image))[1] for image in range(3)]
    for key, value in together.items():
        count = 3 if "ground" in key else 2  # the queries belong to the two images with boxes
        torch.testing.assert_close(value, sum(losses[key] for losses in alone) / count, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PLACED)
def test_rows_of_padding_are_out_of_the_self_attention_of_real_rows(build, name, training):
    adapter = adapter_for(quiet(build(name), training))
    inputs = tiny.batch(64, boxes=(2, 6))
    output, targets = adapter(inputs["pixel_values"])[0], Targets.from_labels(inputs["labels"])
    queries = target_queries(targets)
    before = output.decode(queries)
    moved = queries.boxes.clone()
    moved[~targets.valid] = tiny.random_boxes(4)
    after, seen = (
        output.decode(replace(queries, boxes=moved)),
        output.decode(replace(queries, boxes=moved, groups=None)),
    )
    for layer, same in zip(before, after, strict=True):
        torch.testing.assert_close(same.logits[0, :2], layer.logits[0, :2], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(same.boxes[0, :2], layer.boxes[0, :2], atol=1e-5, rtol=1e-5)
        assert (same.logits[0, 2:] - layer.logits[0, 2:]).abs().max() > 1e-3
    # Not in the first layer where every content is zero: there self-attention passes nothing on.
    assert (seen[-1].logits[0, :2] - before[-1].logits[0, :2]).abs().max() > 1e-4


@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (0,)], ids=str)
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_images_without_boxes_have_only_background_and_a_graph_of_finite_gradients(build, name, counts):
    student = adapter_for(build(name).requires_grad_(True))
    _, losses = distil(student, other(name), tiny.batch(128, boxes=counts), **possible(name))
    assert all(value.requires_grad for value in losses.values())
    for key, value in losses.items():
        found = gradients(student.model, value)
        assert all(gradient.isfinite().all() for gradient in found.values()), key
        if sum(counts) == 0 and "background" not in key:
            assert value == 0 and not any(gradient.any() for gradient in found.values()), key
        else:
            assert value > 0 and value.isfinite(), key
    total(losses).backward()


@pytest.mark.parametrize(
    ("teacher_name", "student_name"),
    [
        ("rt_detr", "deformable_detr/two_stage"),
        ("deformable_detr/plain", "rt_detr"),
        ("conditional_detr", "lw_detr"),
        ("dab-detr", "conditional_detr"),
        ("d_fine", "rf_detr"),
    ],
)
def test_unlike_detectors_distil(build: Callable, teacher_name, student_name):
    teacher = Teacher(tiny.build(teacher_name, 64, seed=1, decoder_layers=2, num_queries=9), tiny.LABELS)
    student = adapter_for(build(student_name).requires_grad_(True))
    method, losses = distil(student, teacher, tiny.batch(64, boxes=(3, 0)))
    assert {name.rsplit("_", 1)[0] for name in losses} == method.weights.keys()
    assert all(value.isfinite() and value > 0 for value in losses.values())
    first = next(p for n, p in student.backbone_parameters() if n.endswith("weight") and p.ndim == 4)
    assert torch.autograd.grad(total(losses), first)[0].any()


def test_detectors_without_a_shared_place_distil_their_memory(build):
    student = adapter_for(build("detr").requires_grad_(True))
    for teacher in (other("detr", 64), other("rt_detr", 64)):
        _, losses = distil(student, teacher, tiny.batch(64), **ONLY_MEMORY)
        assert len(losses) == 2 and all(value > 0 and value.requires_grad for value in losses.values())
