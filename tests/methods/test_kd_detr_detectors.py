"""KD-DETR of real tiny detectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_detrkd.adapters import DetectorAdapter, adapter_for
from hf_detrkd.distillation.teacher import Teacher
from hf_detrkd.methods import KDDETR, KDDETRConfig
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import tiny
from tests.methods.backward import gradients, total
from tests.methods.kd_detr import GROUPS, TWO_STAGE


BOXES = (*TWO_STAGE, "dab-detr", *tiny.GROUPED)
THROUGH_SIGMOID = (*TWO_STAGE, "dab-detr", "conditional_detr")


def pair(build: Callable, student: str, teacher: str, width: int = 32) -> tuple[DetectorAdapter, Teacher]:
    """A student and a teacher of other weights, `width` channels wide."""
    model = tiny.build(teacher, width, seed=1)
    return adapter_for(build(student).requires_grad_(True)), Teacher(model, tiny.LABELS)


def distil(
    student: DetectorAdapter, teacher: Teacher, config: KDDETRConfig, seed: int = 0, **images: Any
) -> dict[str, Tensor]:
    inputs = tiny.batch(64, **images)
    output, _ = student(inputs["pixel_values"])
    targets = Targets.from_labels(inputs["labels"])
    totals = BatchTotals.of(targets.counts, tiny.NUM_QUERIES)
    method = KDDETR(config, student.spec, teacher.spec)
    generator = torch.Generator().manual_seed(seed)
    return method(output, teacher(inputs["pixel_values"]), targets, totals, generator)


def backbone_weight(detector: DetectorAdapter) -> Tensor:
    return next(p for n, p in detector.backbone_parameters() if n.endswith("weight") and p.ndim == 4)


def rounding(family: str, name: str) -> float:
    """A proposal goes through a sigmoid and back to become the student's query; narrow boxes amplify its rounding."""
    return 1e-4 if family in THROUGH_SIGMOID and "specific" in name else 1e-6


@pytest.mark.parametrize(("scale", "class_loss"), [("normalized", "softmax_kl"), ("released", "bce")])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(build, askable, scale, class_loss):
    family = askable
    student = adapter_for(build(family).requires_grad_(True))
    teacher = Teacher(build(family), tiny.LABELS)
    config = KDDETRConfig(general_points=20, scale=scale, class_loss=class_loss, teacher_layers="each")
    losses = distil(student, teacher, config)
    assert len(losses) == 2 * 3 * tiny.NUM_LAYERS
    for name, value in losses.items():
        assert abs(value) < rounding(family, name), name
    # The slope of |x| and of GIoU at 0 is whatever the rounding error's sign says.
    smooth = {k: v for k, v in losses.items() if rounding(family, k) == 1e-6 or "class" in k}
    for name, gradient in gradients(student.model, total(smooth)).items():
        assert gradient.abs().max() < 1e-5, name


def test_the_last_layer_of_a_student_that_is_its_teacher_has_no_loss_when_all_copy_the_last(build, askable):
    family = askable
    losses = distil(adapter_for(build(family)), Teacher(build(family), tiny.LABELS), KDDETRConfig())
    last = {name: value for name, value in losses.items() if name.endswith(f"_{tiny.NUM_LAYERS - 1}")}
    assert len(last) == 6 and all(abs(value) < rounding(family, name) for name, value in last.items())
    assert all(value > 1e-3 for name, value in losses.items() if name not in last)


@pytest.mark.parametrize("content", ["own", "zero", "teacher"])
@pytest.mark.parametrize("family", BOXES)
def test_with_every_content_an_equal_student_has_no_loss(build, family, content):
    config = KDDETRConfig(general_points=20, teacher_layers="each", content=content)
    losses = distil(adapter_for(build(family)), Teacher(build(family), tiny.LABELS), config)
    assert all(abs(value) < rounding(family, name) for name, value in losses.items()), losses


@pytest.mark.parametrize("family", BOXES)
def test_the_contents_are_three_questions(build, family):
    contents = ("own", "zero", "teacher")
    losses = []
    for content in contents:
        student, teacher = pair(build, family, family)
        losses.append(distil(student, teacher, KDDETRConfig(general_points=20, content=content)))
    (own, zero, handed), last = losses, tiny.NUM_LAYERS - 1
    specific, general = f"kd_detr_box_specific_{last}", f"kd_detr_box_general_{last}"
    no_content = family == "dab-detr"  # its own content is zeros

    def same(one: Tensor, other: Tensor) -> bool:
        return torch.isclose(one, other, rtol=1e-5, atol=0.0).item()

    assert same(zero[specific], own[specific]) == same(zero[general], own[general]) == no_content
    assert same(handed[specific], own[specific]) == no_content and same(handed[general], own[general])


@pytest.mark.parametrize(("student", "teacher", "width"), [("rt_detr", "rt_detr", 64), ("d_fine", "rt_detr", 32)])
def test_the_teacher_s_content_needs_one_family_and_width(build, student, teacher, width):
    with pytest.raises(ValueError, match="content teacher needs queries with content and boxes that fit both"):
        distil(*pair(build, student, teacher, width), KDDETRConfig(content="teacher"))


# Parameters that make a family's own queries (and D-FINE's first guess, and a token that RF-DETR never uses).
RT_DETR = ("enc_output", "enc_score_head", "enc_bbox_head", "denoising_class_embed")
LW_DETR = ("enc_output", "enc_out_", "query_feat", "reference_point_embed")
QUERY_MAKERS = {
    "detr": ("query_position_embeddings",),
    "table-transformer": ("query_position_embeddings",),
    "deformable_detr/plain": ("query_position_embeddings", "model.reference_points"),
    "deformable_detr/refine": ("query_position_embeddings", "model.reference_points"),
    "deformable_detr/two_stage": ("model.enc_output", "class_embed.3", "bbox_embed.3"),
    "dino_detr": ("enc_output", "enc_class_embed", "enc_bbox_embed", "query_content", "denoising_class_content"),
    "rt_detr": RT_DETR,
    "rt_detr_v2": RT_DETR,
    "d_fine": (*RT_DETR, "pre_bbox_head"),
    "deimv2": (*RT_DETR, "pre_bbox_head"),
    "conditional_detr": ("query_position_embeddings", "ref_point_head"),
    "dab-detr": ("query_refpoint_embeddings",),
    "lw_detr": LW_DETR,
    "rf_detr": (*LW_DETR, "mask_token"),
}
# The first self-attention passes on nothing but its bias where every content is zero.
READ_ZEROS = {
    f"model.decoder.layers.0.{name}.weight"
    for name in (
        "self_attn.v_proj",
        "self_attn_layer_norm",
        "self_attn.q_content_proj",
        "self_attn.k_content_proj",
        "self_attn.self_attn_query_content_proj",
        "self_attn.self_attn_key_content_proj",
        "self_attn.self_attn_value_proj",
    )
}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("content", ["zero", "own"])
def test_gradients_reach_every_parameter_of_the_student_but_its_queries(build, askable, group, content):
    family = askable
    student, teacher = pair(build, family, family)
    points = 20 if group == "general" else 0
    config = KDDETRConfig(general_points=points, specific_points=group == "specific", content=content)
    found = gradients(student.model, total(distil(student, teacher, config)))
    untouched = {name for name, gradient in found.items() if not gradient.any()} - READ_ZEROS
    assert untouched == {name for name in found if any(maker in name for maker in QUERY_MAKERS[family])}
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_each_term_alone_reaches_the_backbone(build, askable):
    family = askable
    student, teacher = pair(build, family, family)
    losses = distil(student, teacher, KDDETRConfig(general_points=20))
    first = backbone_weight(student)
    for part, group in itertools.product(("class", "box", "giou"), GROUPS):
        terms = [value for name, value in losses.items() if name.startswith(f"kd_detr_{part}_{group}_")]
        assert torch.autograd.grad(torch.stack(terms).sum(), first, retain_graph=True)[0].any(), (part, group)


@pytest.mark.parametrize(("points", "calls"), [(0, 1), (20, 2)])
def test_specific_points_cost_no_teacher_pass(build, askable, points, calls):
    family = askable
    student, teacher = pair(build, family, family)
    decoder_calls, encoder_calls = [], []
    teacher.model.model.decoder.register_forward_hook(lambda *_: decoder_calls.append(1))
    backbone = teacher.model.model.conv_encoder if family == "deimv2" else teacher.model.model.backbone
    backbone.register_forward_hook(lambda *_: encoder_calls.append(1))
    distil(student, teacher, KDDETRConfig(general_points=points))
    assert (len(decoder_calls), len(encoder_calls)) == (calls, 1)


UNLIKE_PAIRS = [  # teacher, student, what they share
    ("rt_detr", "deformable_detr/two_stage", "boxes"),
    ("deformable_detr/two_stage", "rt_detr", "boxes"),
    ("rt_detr", "deformable_detr/plain", "boxes"),
    ("deformable_detr/two_stage", "deformable_detr/plain", "boxes"),
    ("deformable_detr/two_stage", "deformable_detr/refine", "boxes"),
    ("deformable_detr/plain", "deformable_detr/plain", "points"),
    ("deformable_detr/plain", "deformable_detr/refine", "points"),
    ("rt_detr", "rt_detr", "boxes"),
    ("deformable_detr/two_stage", "deformable_detr/two_stage", "boxes"),
]


@pytest.mark.parametrize("content", ["zero", "own"])
@pytest.mark.parametrize(("teacher_name", "student_name", "shared"), UNLIKE_PAIRS)
def test_unlike_detectors_share_places(build, teacher_name, student_name, shared, content):
    student, teacher = pair(build, student_name, teacher_name, width=64)
    looked_at = []
    student.model.model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: looked_at.append(kwargs["reference_points"]), with_kwargs=True
    )
    pixels = tiny.batch(64)["pixel_values"]
    config = KDDETRConfig(general_points=20, content=content)
    losses = distil(student, teacher, config)
    assert len(losses) == 2 * 3 * tiny.NUM_LAYERS and all(value.isfinite() and value > 0 for value in losses.values())
    assert any(g.any() for n, g in gradients(student.model, total(losses)).items() if n.startswith("model.backbone."))
    seen = looked_at[1].sigmoid() if student_name == "rt_detr" else looked_at[1]  # the second pass: specific points
    wanted = getattr(teacher(pixels).queries, shared)
    torch.testing.assert_close(seen, wanted[..., : seen.shape[-1]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("teacher_name", ["deformable_detr/plain", "deformable_detr/refine"])
@pytest.mark.parametrize("student_name", TWO_STAGE)
def test_a_teacher_of_points_teaches_a_student_of_boxes_by_general_points(build, teacher_name, student_name):
    student, teacher = pair(build, student_name, teacher_name, width=64)
    losses = distil(student, teacher, KDDETRConfig(general_points=20, specific_points=False))
    assert len(losses) == 3 * tiny.NUM_LAYERS and all(value.isfinite() and value > 0 for value in losses.values())
