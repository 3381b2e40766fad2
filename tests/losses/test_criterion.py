"""The detection loss of random answers of every family: transformers' own value and gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_detrkd.losses.criterion import Answers
from hf_detrkd.structures.outputs import Predictions
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import each, tiny
from tests.losses.criterion import (
    COUNTS,
    CRITERIA,
    DENOISING,
    GROUPED,
    assert_same_loss,
    comparable,
    criterion_of,
    random_predictions,
    reference,
    tensors_of,
)


def proposals_as(family: str, proposals: Predictions | None) -> dict[str, Tensor]:
    """Encoder proposals by the names of transformers' loss."""
    names = ("enc_outputs_class", "enc_outputs_coord") if family in GROUPED else ("enc_topk_logits", "enc_topk_bboxes")
    return {} if proposals is None else dict(zip(names, tensors_of([proposals]), strict=True))


# Without boxes transformers divides by one, ours by one for every group.
PAIRS = [(family, counts) for family in CRITERIA for counts in COUNTS if sum(counts) or family not in GROUPED]


@each(("family", "counts"), PAIRS)
@each(("depth", "queries"), [(2, 7), (4, 30)])
@each("auxiliary", [False, True])
def test_value_and_gradient_are_those_of_transformers(family, counts, depth, queries, auxiliary):
    config = tiny.config(family, **comparable(family, decoder_layers=depth, auxiliary_loss=auxiliary))
    criterion = replace(criterion_of(config), auxiliary=auxiliary)
    groups = tiny.NUM_GROUPS if family in GROUPED else 1
    labels = tiny.batch(boxes=counts)["labels"]
    layers = [random_predictions(criterion, len(counts), groups * queries) for _ in range(depth)]
    two_stage = family in GROUPED or (family in DENOISING and auxiliary)
    proposals = random_predictions(criterion, len(counts), groups * queries) if two_stage else None
    expected, _ = reference(config, layers, labels, **proposals_as(family, proposals))
    answers = Answers(tuple(layers), groups, proposals)
    losses = criterion(answers, Targets.from_labels(labels), BatchTotals.of(counts, queries))
    assert_same_loss(sum(losses.values()), expected, tensors_of(layers if proposals is None else [*layers, proposals]))


COEFFICIENTS = {"bbox_loss_coefficient": 3, "giou_loss_coefficient": 4}
RT_DETR = {
    "weight_loss_vfl": 2.0,
    "weight_loss_bbox": 3.0,
    "weight_loss_giou": 4.0,
    "focal_loss_alpha": 0.5,
    "focal_loss_gamma": 3.0,
    "matcher_alpha": 0.4,
    "matcher_gamma": 1.0,
}
WEIGHTS = {
    **dict.fromkeys(("detr", "table-transformer"), COEFFICIENTS | {"eos_coefficient": 0.3, "class_cost": 4}),
    **dict.fromkeys(
        ("conditional_detr", "dab-detr", "deformable_detr"), COEFFICIENTS | {"focal_alpha": 0.4, "bbox_cost": 1}
    ),
    **dict.fromkeys(("rt_detr", "rt_detr_v2"), RT_DETR),
    **dict.fromkeys(GROUPED, COEFFICIENTS | {"class_loss_coefficient": 2, "focal_alpha": 0.4, "giou_cost": 1}),
}


@pytest.mark.parametrize("family", CRITERIA)
def test_the_weights_are_those_of_the_config(family):
    plain = tiny.config(family)
    weights = {name: weight for name, weight in WEIGHTS[plain.model_type].items() if hasattr(plain, name)}
    overrides = comparable(family, auxiliary_loss=True, **weights)
    config = tiny.config(family, **overrides | {"group_detr": 1} if family in GROUPED else overrides)
    assert criterion_of(config) != criterion_of(plain)
    labels = tiny.batch(boxes=(3, 2))["labels"]
    layers = [random_predictions(criterion_of(config), 2) for _ in range(tiny.NUM_LAYERS + 1)]
    layers, proposals = (layers[:-1], layers[-1]) if family in DENOISING + GROUPED else (layers[1:], None)
    expected, _ = reference(config, layers, labels, **proposals_as(family, proposals))
    answers = Answers(tuple(layers), encoder=proposals)
    losses = criterion_of(config)(answers, Targets.from_labels(labels), BatchTotals.of((3, 2), 7))
    assert_same_loss(sum(losses.values()), expected, tensors_of(layers))


@pytest.mark.parametrize("family", CRITERIA)
def test_half_precision_logits_under_autocast_give_the_loss_of_their_float32_values(family):
    criterion, labels = criterion_of(tiny.config(family)), tiny.batch(boxes=(3, 2))["labels"]
    half = [replace(one, logits=one.logits.bfloat16()) for one in (random_predictions(criterion, 2) for _ in range(3))]
    full = [replace(one, logits=one.logits.float()) for one in half]
    targets, totals = Targets.from_labels(labels), BatchTotals.of((3, 2), 7)
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion(Answers(tuple(half)), targets, totals)
    expected = criterion(Answers(tuple(full)), targets, totals)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
