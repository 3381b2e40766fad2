"""Losses against the ground truth of matched boxes: a loop over queries, written from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from hf_detrkd.losses.functional import (
    KINDS,
    box_overlap,
    detection_losses,
    gather_matched,
    hard_class_loss,
    scatter_matched,
)
from tests import each, tiny


GRID = [(1, 1, 1, 1), (3, 2, 7, 4), (2, 3, 4, 6), (1, 2, 5, 0)]


@pytest.mark.parametrize(("layers", "batch", "queries", "most"), GRID)
def test_values_of_boxes_are_laid_out_by_query(layers, batch, queries, most):
    index, values = tiny.random_index(layers, batch, queries, most), torch.rand(layers, batch, most)
    rows = torch.rand(layers, batch, queries)
    found = scatter_matched(index, values, rows)
    for layer in range(layers):
        for image in range(batch):
            expected = rows[layer, image].tolist()
            for box in range(most):
                if index[layer, image, box] >= 0:
                    expected[index[layer, image, box]] = values[layer, image, box].item()
            assert found[layer, image].tolist() == expected


def test_matched_rows_are_read_in_the_order_of_the_boxes_and_unmatched_ones_read_row_zero():
    values, index = torch.randn(3, 2, 7, 4), tiny.random_index(3, 2, 7, 5)
    found = gather_matched(values, index)
    for place in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(5)).tolist():
        layer, image, box = place
        assert torch.equal(found[layer, image, box], values[layer, image, max(index[layer, image, box].item(), 0)])


def naive_class_loss(row: list[float], label: int | None, iou: float, kind: str) -> float:
    """One query, from the formulas; `label` is `None` for no-object."""
    if kind == "cross_entropy":
        wanted = len(row) - 1 if label is None else label
        weight = 0.1 if label is None else 1.0
        return weight * (math.log(sum(math.exp(value) for value in row)) - row[wanted])
    total = 0.0
    for column, value in enumerate(row):
        p = 1 / (1 + math.exp(-value))
        hit = label == column
        if kind == "focal":
            total += -0.25 * (1 - p) ** 2 * math.log(p) if hit else -0.75 * p**2 * math.log(1 - p)
            continue
        target, weight = 0.0, {"iou_aware": 1.0}.get(kind, 0.25) * p**2
        if hit:
            target = {"varifocal": iou, "matchability": iou**2, "iou_aware": max(p**0.25 * iou**0.75, 0.01)}[kind]
            weight = iou if kind == "varifocal" else 1.0
        total -= weight * (target * math.log(p) + (1 - target) * math.log(1 - p))
    return total


@each("kind", KINDS)
@each("classes", [1, 5, 20])
@each(("layers", "batch", "queries", "most"), GRID)
def test_detection_losses_are_those_of_a_loop_over_queries(kind, classes, layers, batch, queries, most):
    columns = classes + (kind == "cross_entropy")
    logits, boxes = torch.randn(layers, batch, queries, columns) * 2, tiny.random_boxes(layers, batch, queries)
    index, labels = tiny.random_index(layers, batch, queries, most), torch.randint(0, classes, (batch, most))
    targets = tiny.random_boxes(batch, most)
    found = torch.stack(detection_losses(logits, boxes, index, labels, targets, kind))
    expected = torch.zeros(3, layers)
    for layer in range(layers):
        for image in range(batch):
            owner = {query: box for box, query in enumerate(index[layer, image].tolist()) if query >= 0}
            for query in range(queries):
                box, overlap = owner.get(query), 0.0
                if box is not None:
                    pair = boxes[layer, image, query], targets[image, box]
                    corners = [box_convert(side[None], "cxcywh", "xyxy") for side in pair]
                    overlap = box_iou(*corners).item()
                    expected[1, layer] += (pair[0] - pair[1]).abs().sum()
                    expected[2, layer] += 1 - generalized_box_iou(*corners).item()
                label = None if box is None else labels[image, box].item()
                row = logits[layer, image, query].tolist()
                expected[0, layer] += naive_class_loss(row, label, overlap, kind)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_varifocal_target_and_weight_send_no_gradient_through_box_or_score():
    logits, boxes = torch.randn(1, 1, 4, 3).requires_grad_(), tiny.random_boxes(1, 1, 4).requires_grad_()
    index, labels, targets = torch.tensor([[[2]]]), torch.tensor([[1]]), tiny.random_boxes(1, 1)
    classes, *_ = detection_losses(logits, boxes, index, labels, targets, "varifocal")
    by_logits, by_boxes = torch.autograd.grad(classes.sum(), (logits, boxes), allow_unused=True)
    assert by_boxes is None or not by_boxes.any()
    with torch.no_grad():
        probabilities, iou = logits.sigmoid(), box_overlap(boxes[0, 0, 2], targets[0, 0])[0]
        expected = 0.25 * probabilities**2 * probabilities
        expected[0, 0, 2, 1] = iou * (probabilities[0, 0, 2, 1] - iou)
    torch.testing.assert_close(by_logits, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_class_losses_of_extreme_logits_are_finite(kind):
    logits = (torch.randint(0, 2, (2, 2, 6, 4)) * 100.0 - 50).requires_grad_()
    index = tiny.random_index(2, 2, 6, 3)
    loss = hard_class_loss(logits, index, torch.randint(0, 3, (2, 3)), kind, torch.rand(2, 2, 3))
    assert loss.shape == (2,) and loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


def test_unmatched_boxes_and_padding_change_no_loss():
    logits, boxes, labels = torch.randn(1, 1, 4, 3), tiny.random_boxes(1, 1, 4), torch.tensor([[1, 2, 0]])
    targets, index = tiny.random_boxes(1, 3), torch.tensor([[[3, -1, -1]]])
    for kind in KINDS:
        padded = detection_losses(logits, boxes, index, labels, targets, kind)
        alone = detection_losses(logits, boxes, index[..., :1], labels[:, :1], targets[:, :1], kind)
        for found, expected in zip(padded, alone, strict=True):
            torch.testing.assert_close(found, expected)
