"""The matcher against brute force over permutations, against transformers' matchers, and against double loops."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_for_object_detection import HungarianMatcher as DetrHungarianMatcher
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

from hf_detrkd.adapters import ADAPTERS
from hf_detrkd.losses.functional import class_targets
from hf_detrkd.losses.matching import HungarianMatcher, match_columns, to_host, to_host_by_group, vote
from hf_detrkd.structures.outputs import Predictions
from hf_detrkd.structures.targets import Targets
from tests import each, tiny


HEADS = ("sigmoid", "softmax")


def random_layers(activation: str, layers: int = 1, batch: int = 2, queries: int = 7) -> list[Predictions]:
    columns = tiny.NUM_CLASSES + (activation == "softmax")
    return [
        Predictions(torch.randn(batch, queries, columns) * 2, tiny.random_boxes(batch, queries), None, activation)
        for _ in range(layers)
    ]


def random_targets(*counts: int) -> Targets:
    return Targets.from_labels(tiny.batch(boxes=counts)["labels"])


# --- the assignment --------------------------------------------------------------------------------------------------


def cheapest(cost: np.ndarray) -> float:
    """Smallest total over all one-to-one assignments that use up rows or columns."""
    rows, columns = cost.shape
    if rows < columns:
        return cheapest(cost.T)
    return min(
        sum(cost[row, column] for column, row in enumerate(chosen)) for chosen in permutations(range(rows), columns)
    )


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 1), (5, 3), (6, 4), (4, 4), (3, 5), (1, 4)])
def test_no_permutation_is_cheaper_than_the_assignment(rows, columns):
    cost = np.random.default_rng(rows * 10 + columns).normal(size=(2, 3, rows, columns))
    index = match_columns(cost, [columns] * 3)
    for layer, image in np.ndindex(2, 3):
        chosen = index[layer, image]
        used = chosen[chosen >= 0]
        assert len(used) == len(set(used)) == min(rows, columns)
        total = sum(cost[layer, image, row, column] for column, row in enumerate(chosen) if row >= 0)
        assert total == pytest.approx(cheapest(cost[layer, image]))


def test_padding_columns_get_no_row_even_if_they_are_cheapest():
    cost = np.random.default_rng(0).normal(size=(2, 3, 6, 4))
    counts = [2, 0, 4]
    alone = match_columns(cost, counts)
    for image, count in enumerate(counts):
        cost[:, image, :, count:] = -1e9
    index = match_columns(cost, counts)
    assert (index == alone).all()
    assert ((index >= 0).sum(-1) == counts).all()
    assert all((index[:, image, count:] == -1).all() for image, count in enumerate(counts))


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_every_group_of_rows_is_matched_as_if_it_were_alone(groups):
    cost, counts = np.random.default_rng(groups).normal(size=(2, 3, groups * 6, 4)), [2, 0, 4]
    index = match_columns(cost, counts, groups).reshape(2, 3, groups, 4)
    for group in range(groups):
        alone = match_columns(cost[:, :, group * 6 : group * 6 + 6], counts)
        assert (index[:, :, group] == np.where(alone < 0, -1, alone + group * 6)).all()


def votes_counted(indices: list[np.ndarray], image: int) -> dict[int, int]:
    """Row to column in one image, by counting."""
    ballots: dict[int, list[int]] = {}
    for index in indices:
        for layer in index[:, image].tolist():
            for column, row in enumerate(layer):
                if row >= 0:
                    ballots.setdefault(row, []).append(column)
    return {row: max(sorted(set(c)), key=c.count) for row, c in ballots.items()}


@pytest.mark.parametrize("counts", [(2, 1), (3, 0), (0, 0), (4, 4, 1)])
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_every_row_that_a_layer_matched_gets_the_column_that_most_layers_gave_it(counts, queries):
    random = np.random.default_rng(len(counts) + queries)
    shape = (len(counts), queries, max(counts))
    indices = [match_columns(random.normal(size=(layers, *shape)), counts) for layers in (3, 1)]
    rows, columns = vote(indices, queries)
    for image in range(len(counts)):
        taken = rows[image] >= 0
        found = dict(zip(rows[image][taken].tolist(), columns[image][taken].tolist(), strict=True))
        assert found == votes_counted(indices, image)
    assert columns.min(initial=0) >= 0 and (rows >= 0).sum(-1).max() == rows.shape[1]


def test_the_costs_of_several_losses_share_one_copy_and_come_back_apart(monkeypatch):
    copies = []
    monkeypatch.setattr("hf_detrkd.losses.matching.to_host", lambda tensors: copies.append(1) or to_host(tensors))
    first, second, third = torch.rand(2, 3), torch.rand(4), torch.rand(1, 1)
    results = to_host_by_group([[first, second], [], [third]])
    assert [[array.tolist() for array in group] for group in results] == [
        [first.tolist(), second.tolist()],
        [],
        [third.tolist()],
    ]
    assert len(copies) == 1


def test_images_without_columns_get_an_empty_answer():
    index = match_columns(np.zeros((3, 2, 5, 0)), [0, 0])
    assert index.shape == (3, 2, 0) and index.dtype == np.int64


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_query_with_a_broken_cost_is_matched_only_if_no_other_is_left(bad):
    cost = torch.rand(1, 2, 4, 3)
    cost[0, :, 1] = bad
    (host,) = to_host([cost])
    assert np.isfinite(host).all()
    assert 1 not in match_columns(host, [3, 3])
    assert 1 in match_columns(host[..., :2, :2], [2, 2])


def test_host_copies_keep_shapes_and_values_of_all_tensors():
    tensors = [torch.randn(2, 3).bfloat16(), torch.randn(0, 4), torch.randn(1, 2, 3, requires_grad=True)]
    for found, expected in zip(to_host(tensors), tensors, strict=True):
        assert found.dtype == np.float32 and found.shape == tuple(expected.shape)
        assert np.array_equal(found, expected.detach().float().numpy())


# --- with the ground truth -------------------------------------------------------------------------------------------


def softmax_matcher(c: transformers.PreTrainedConfig) -> DetrHungarianMatcher:
    return DetrHungarianMatcher(c.class_cost, c.bbox_cost, c.giou_cost)


def focal_matcher(c: transformers.PreTrainedConfig) -> DeformableDetrHungarianMatcher:
    return DeformableDetrHungarianMatcher(c.class_cost, c.bbox_cost, c.giou_cost)


REFERENCES = {
    **dict.fromkeys(("detr", "table-transformer", "yolos"), softmax_matcher),
    **dict.fromkeys(("conditional_detr", "dab-detr", "deformable_detr", "dino_detr"), focal_matcher),
    **dict.fromkeys(("lw_detr", "rf_detr"), focal_matcher),
    **dict.fromkeys(tiny.HYBRID, RTDetrHungarianMatcher),
}


@each("counts", [(2, 1), (3, 0), (0, 0), (9, 2), (1, 7, 12)])
@each("queries", [1, 7, 50])
def test_every_family_matches_like_transformers(family, counts, queries):
    config = tiny.config(family)
    criterion = ADAPTERS[config.model_type].criterion_of(config)
    activation = "softmax" if criterion.classification == "cross_entropy" else "sigmoid"
    layers, targets = random_layers(activation, 3, len(counts), queries), random_targets(*counts)
    index = criterion.matcher(layers, targets)
    assert index.shape == (3, len(counts), max(counts)) and index.dtype == torch.long
    for layer, found in zip(layers, index, strict=True):
        outputs = {"logits": layer.logits, "pred_boxes": layer.boxes}
        expected = torch.full_like(found, -1)
        for image, (rows, columns) in enumerate(REFERENCES[config.model_type](config)(outputs, targets.to_labels())):
            expected[image, columns] = rows
        assert torch.equal(found, expected)


def test_every_family_matches_with_the_weights_of_its_config(family):
    weights = {"class_cost": 3, "bbox_cost": 4, "giou_cost": 7}
    if family in tiny.HYBRID:
        weights = {f"matcher_{name}": float(value) for name, value in weights.items()}
        weights |= {"matcher_alpha": 0.4, "matcher_gamma": 1.0}
    config = tiny.config(family, **weights)
    matcher = ADAPTERS[config.model_type].criterion_of(config).matcher
    focal = (0.4, 1.0) if family in tiny.HYBRID else (0.25, 2.0)
    assert matcher == HungarianMatcher(3, 4, 7, *focal)


@pytest.mark.parametrize("activation", HEADS)
def test_the_cost_is_that_of_a_loop_over_queries_and_boxes(activation):
    layers, targets = random_layers(activation, layers=2), random_targets(3, 1)
    matcher = HungarianMatcher(1.5, 3.0, 0.5, alpha=0.4, gamma=3.0)
    cost = matcher.cost_of_layers(layers, targets)
    assert cost.shape == (2, 2, 7, 3)
    for layer, image, query in np.ndindex(2, 2, 7):
        logits, box = layers[layer].logits[image, query], layers[layer].boxes[image, query]
        for column in range(targets.counts[image]):
            label, wanted = targets.labels[image, column], targets.boxes[image, column]
            if activation == "softmax":
                by_class = -(logits[label].exp() / logits.exp().sum()).item()
            else:
                p = 1 / (1 + math.exp(-logits[label].item()))
                by_class = 0.4 * (1 - p) ** 3 * -math.log(p) - 0.6 * p**3 * -math.log(1 - p)
            expected = 1.5 * by_class + box_cost(box, wanted, 3.0, 0.5)
            assert cost[layer, image, query, column].item() == pytest.approx(expected, abs=1e-4)


def box_cost(box: Tensor, other: Tensor, box_weight: float, giou_weight: float) -> float:
    corners = [box_convert(side[None], "cxcywh", "xyxy") for side in (box, other)]
    giou = generalized_box_iou(*corners).item()
    return box_weight * (box - other).abs().sum().item() - giou_weight * giou


def test_queries_with_nan_are_passed_over():
    (layer,), targets = random_layers("sigmoid", queries=5), random_targets(3, 2)
    layer.logits[0, 1], layer.boxes[1, 4] = math.nan, math.nan
    index = HungarianMatcher()([layer], targets)
    assert 1 not in index[0, 0] and 4 not in index[0, 1]
    assert ((index >= 0).sum(-1) == torch.tensor([3, 2])).all()


def test_matching_sends_no_gradient_and_runs_on_half_precision():
    (layer,), targets = random_layers("sigmoid"), random_targets(3, 2)
    logits = layer.logits.bfloat16().requires_grad_()
    half, full = (Predictions(values, layer.boxes) for values in (logits, logits.detach().float()))
    matcher = HungarianMatcher()
    assert not matcher.cost_of_layers([half], targets).requires_grad
    assert not matcher.cost_between(half, layer).requires_grad
    assert torch.equal(matcher([half], targets), matcher([full], targets))


# --- between two detectors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", HEADS)
@pytest.mark.parametrize("teacher", HEADS)
@pytest.mark.parametrize(("queries", "others"), [(7, 7), (3, 9), (9, 1)])
def test_the_cost_between_detectors_is_that_of_a_double_loop(student, teacher, queries, others):
    (own,), (other,) = random_layers(student, queries=queries), random_layers(teacher, queries=others)
    cost = HungarianMatcher(1.5, 3.0, 0.5).cost_between(own, other)
    assert cost.shape == (2, queries, others)
    wanted = class_targets(other, student)
    for image, row, column in np.ndindex(2, queries, others):
        logits, target = own.logits[image, row], wanted[image, column]
        if student == "sigmoid":
            by_class = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        else:
            by_class = F.cross_entropy(logits, target)
        expected = 1.5 * by_class.item() + box_cost(own.boxes[image, row], other.boxes[image, column], 3.0, 0.5)
        assert cost[image, row, column].item() == pytest.approx(expected, abs=1e-4)


def test_a_detector_that_answers_like_another_in_another_order_is_paired_by_that_order():
    (teacher,), order = random_layers("sigmoid", batch=1, queries=20), torch.randperm(20)
    confident = Predictions(teacher.logits * 5, teacher.boxes)
    student = Predictions(confident.logits[:, order], confident.boxes[:, order])
    (cost,) = to_host([HungarianMatcher().cost_between(student, confident)[None]])
    assert torch.equal(order[match_columns(cost, [20])[0, 0]], torch.arange(20))
