"""KD-DETR: its mathematics against naive loops on random answers, its points, and real tiny detectors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch
import transformers
from torch import Tensor

from hf_detrkd.adapters import DetectorAdapter, adapter_for, spec_for
from hf_detrkd.methods import KDDETR, KDDETRConfig
from hf_detrkd.outputs import BatchTotals, DetectorOutput, Targets
from hf_detrkd.teacher import Teacher
from tests import tiny
from tests.methods import naive
from tests.methods.fakes import Fake, by_image, spec, targets_of


HEADS = ("sigmoid", "softmax")
GROUPS = ("specific", "general")
TWO_STAGE = ("deformable_detr/two_stage", *tiny.DENOISING)
THROUGH_SIGMOID = (*TWO_STAGE, "dab-detr", "conditional_detr")
# (batch, general points, queries of student and teacher, layers of both, classes)
SIZES = {
    "equal": (2, 4, 5, 5, 2, 2, 3),
    "teacher deeper and wider": (1, 3, 4, 6, 2, 4, 1),
    "student deeper": (3, 2, 6, 3, 3, 2, 5),
    "one of everything": (1, 1, 1, 1, 1, 1, 2),
}


def compare(method: KDDETR, student: DetectorOutput, teacher: DetectorOutput, seed: int = 0) -> dict[str, Tensor]:
    targets = targets_of(*[1] * student.layers[0].boxes.shape[0])
    totals = BatchTotals.of(targets.counts, 100)
    return method(student, teacher, targets, totals, torch.Generator().manual_seed(seed))


def fakes(sizes: tuple[int, ...], student_head: str = "sigmoid", teacher_head: str = "sigmoid") -> tuple[Fake, Fake]:
    batch_size, _, student_queries, teacher_queries, student_layers, teacher_layers, classes = sizes
    student = spec(student_queries, student_layers, classes, student_head)
    teacher = spec(teacher_queries, teacher_layers, classes, teacher_head)
    return Fake(student, batch_size, trains=True), Fake(teacher, batch_size)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("student_head", HEADS)
@pytest.mark.parametrize("teacher_head", HEADS)
@pytest.mark.parametrize("scale", ["normalized", "released"])
@pytest.mark.parametrize("class_loss", ["softmax_kl", "bce"])
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
    config = KDDETRConfig(general_points=0, temperature=temperature)
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


# --- points ----------------------------------------------------------------------------------------------------------


def points(seed: int = 0, config: KDDETRConfig | None = None, batch_size: int = 2) -> tuple[Fake, Fake]:
    student, teacher = Fake(spec(width=16), batch_size), Fake(spec(), batch_size)
    method = KDDETR(config or KDDETRConfig(specific_points=False), student.spec, teacher.spec)
    compare(method, student.output, teacher.output, seed)
    return student, teacher


def test_both_models_are_asked_the_same_general_points_from_zero_content():
    student, teacher = points()
    assert torch.equal(student.asked[0].boxes, teacher.asked[0].boxes)
    assert student.asked[0].boxes.shape == (2, 300, 4)
    assert torch.equal(student.asked[0].content, torch.zeros(2, 300, 16))
    assert torch.equal(teacher.asked[0].content, torch.zeros(2, 300, 8))


@pytest.mark.parametrize("width", [8, 16])
def test_own_content_is_left_to_each_model_even_where_the_teacher_s_would_fit(width):
    student, teacher = Fake(spec(width=width)), Fake(spec(width=8))
    compare(KDDETR(KDDETRConfig(content="own"), student.spec, teacher.spec), student.output, teacher.output)
    asked = [*student.asked, *teacher.asked]
    assert len(asked) == 3 and all(queries.fields == {"boxes"} for queries in asked)


@pytest.mark.parametrize("distribution", ["normal_logit", "uniform"])
def test_general_points_follow_the_generator_and_nothing_else(distribution):
    config = KDDETRConfig(specific_points=False, general_points=50, general_distribution=distribution)
    boxes = points(seed=3, config=config)[0].asked[0].boxes
    torch.manual_seed(1234)  # another process: its own global state, another number of images
    again = points(seed=3, config=config, batch_size=5)[0].asked[0].boxes
    assert torch.equal(boxes[0], again[0]) and not torch.equal(boxes, points(4, config)[0].asked[0].boxes)
    assert (again == again[0]).all()


def test_general_points_are_normal_before_the_sigmoid():
    config = KDDETRConfig(specific_points=False, general_points=5000)
    boxes = points(config=config)[0].asked[0].boxes[0]
    for side in boxes.logit().T.numpy():
        assert scipy.stats.kstest(side, "norm").pvalue > 0.01


def test_uniform_points_are_uniform_with_sides_of_at_least_a_hundredth():
    config = KDDETRConfig(specific_points=False, general_points=5000, general_distribution="uniform")
    boxes = points(config=config)[0].asked[0].boxes[0]
    assert boxes[:, 2:].min() == torch.tensor(0.01)
    for side in boxes.T.numpy():
        assert scipy.stats.kstest(side[side > 0.01], "uniform", (0.0, 1.0)).pvalue > 0.01


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        (KDDETRConfig(general_points=0), {"specific"}),
        (KDDETRConfig(specific_points=False), {"general"}),
        (KDDETRConfig(), set(GROUPS)),
    ],
)
def test_each_group_can_be_switched_off(config, groups):
    student, teacher = Fake(spec()), Fake(spec())
    losses = compare(KDDETR(config, student.spec, teacher.spec), student.output, teacher.output)
    assert {name.split("_")[3] for name in losses} == groups
    assert len(student.asked) == len(groups) and len(teacher.asked) == ("general" in groups)


def test_specific_points_are_the_teacher_s_boxes_without_its_content():
    student, teacher = Fake(spec()), Fake(spec())
    compare(KDDETR(KDDETRConfig(), student.spec, teacher.spec), student.output, teacher.output)
    assert torch.equal(student.asked[0].boxes, teacher.output.queries.boxes)
    assert not student.asked[0].content.any()


def test_learned_queries_of_an_equal_model_are_shared_whole():
    fields = "content position points"
    student, teacher = Fake(spec(fields=fields)), Fake(spec(fields=fields))
    compare(KDDETR(KDDETRConfig(), student.spec, teacher.spec), student.output, teacher.output)
    asked = student.asked[0]
    assert asked.fields == {"content", "position", "points"}
    assert all(torch.equal(getattr(asked, name), getattr(teacher.output.queries, name)) for name in asked.fields)


def test_points_of_embeddings_spread_like_the_teacher_s_own():
    student, teacher = Fake(spec(fields="position")), Fake(spec(fields="position", num_queries=4000))
    own = teacher.output.queries.position
    own *= torch.linspace(0, 4, 8)
    own += torch.linspace(-3, 3, 8)
    own[1] = own[0]
    compare(KDDETR(KDDETRConfig(general_points=4000), student.spec, teacher.spec), student.output, teacher.output)
    drawn = teacher.asked[0].position
    assert torch.equal(drawn, student.asked[1].position) and torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn[0].mean(0), own[0].mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(drawn[0].std(0), own[0].std(0), atol=0.05, rtol=0)


# --- refusals --------------------------------------------------------------------------------------------------------


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


# --- real detectors --------------------------------------------------------------------------------------------------


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


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def gradients(model: transformers.PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def rounding(family: str, name: str) -> float:
    """A proposal goes through a sigmoid and back to become the student's query; narrow boxes amplify its rounding."""
    return 1e-4 if family in THROUGH_SIGMOID and "specific" in name else 1e-6


@pytest.mark.parametrize(("scale", "class_loss"), [("normalized", "softmax_kl"), ("released", "bce")])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(build, askable, scale, class_loss):
    family = askable
    student = adapter_for(build(family).requires_grad_(True))
    teacher = Teacher(build(family), tiny.LABELS)
    config = KDDETRConfig(general_points=20, content="own", scale=scale, class_loss=class_loss, teacher_layers="each")
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
    losses = distil(adapter_for(build(family)), Teacher(build(family), tiny.LABELS), KDDETRConfig(content="own"))
    last = {name: value for name, value in losses.items() if name.endswith(f"_{tiny.NUM_LAYERS - 1}")}
    assert len(last) == 6 and all(abs(value) < rounding(family, name) for name, value in last.items())
    assert all(value > 1e-3 for name, value in losses.items() if name not in last)


@pytest.mark.parametrize("family", TWO_STAGE)
def test_with_zero_content_only_the_general_points_of_an_equal_student_have_no_loss(build, family):
    config = KDDETRConfig(general_points=20, teacher_layers="each")
    losses = distil(adapter_for(build(family)), Teacher(build(family), tiny.LABELS), config)
    for name, value in losses.items():
        assert value < 1e-6 if "general" in name else value > 1e-6, name


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
