"""Overlap and distance of boxes against torchvision and torch, degenerate and half-precision ones included."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from hf_detrkd.losses.functional import box_distance, box_losses, box_overlap
from tests import tiny


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (20, 40), (3, 0)])
def test_overlap_of_all_pairs_is_that_of_torchvision(rows, columns):
    boxes, others = tiny.random_boxes(rows), tiny.random_boxes(columns)
    others[: min(rows, columns) // 2] = boxes[: min(rows, columns) // 2]
    iou, giou = box_overlap(boxes[:, None], others[None])
    corners = [box_convert(b, "cxcywh", "xyxy") for b in (boxes, others)]
    torch.testing.assert_close(iou, box_iou(*corners), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(giou, generalized_box_iou(*corners), atol=1e-6, rtol=1e-5)


def test_overlap_of_pairs_is_the_diagonal_of_all_pairs():
    boxes, others = tiny.random_boxes(2, 6), tiny.random_boxes(2, 6)
    pairs, everything = box_overlap(boxes, others), box_overlap(boxes[:, :, None], others[:, None])
    for pair, matrix in zip(pairs, everything, strict=True):
        torch.testing.assert_close(pair, matrix.diagonal(dim1=1, dim2=2))


def test_gradient_of_overlap_is_that_of_torchvision():
    boxes, others = tiny.random_boxes(30).requires_grad_(), tiny.random_boxes(30)
    corners = box_convert(boxes, "cxcywh", "xyxy"), box_convert(others, "cxcywh", "xyxy")
    (expected,) = torch.autograd.grad(generalized_box_iou(*corners).diagonal().sum(), boxes)
    (found,) = torch.autograd.grad(box_overlap(boxes, others)[1].sum(), boxes)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_degenerate_boxes_overlap_without_nan_and_with_finite_gradients():
    real, point = torch.tensor([0.5, 0.5, 0.2, 0.2]), torch.tensor([0.5, 0.5, 0.0, 0.0])
    far, line = torch.tensor([0.9, 0.9, 0.0, 0.0]), torch.tensor([0.5, 0.5, 0.2, 0.0])
    pairs = [(point, point), (point, far), (point, real), (real, point), (line, real), (far, real)]
    boxes, others = (torch.stack(side) for side in zip(*pairs, strict=True))
    boxes.requires_grad_()
    iou, giou = box_overlap(boxes, others)
    assert (iou == 0).all() and giou.isfinite().all() and giou[0] == 0
    assert giou.min() >= -1 and giou.max() <= 1
    assert torch.autograd.grad(giou.sum(), boxes)[0].isfinite().all()


def test_overlap_stays_in_its_range_and_is_symmetric():
    boxes, others = tiny.random_boxes(500), tiny.random_boxes(500)
    (iou, giou), (swapped, generalized) = box_overlap(boxes, others), box_overlap(others, boxes)
    assert iou.min() >= 0 and iou.max() <= 1 and giou.min() >= -1 and (giou <= iou).all()
    torch.testing.assert_close(iou, swapped)
    torch.testing.assert_close(giou, generalized)


@pytest.mark.parametrize("shape", [(1,), (4, 3), (2, 5, 6), (0,)])
def test_distance_is_the_sum_of_absolute_differences(shape):
    boxes, others = tiny.random_boxes(*shape), tiny.random_boxes(*shape)
    torch.testing.assert_close(box_distance(boxes, others), (boxes - others).abs().sum(-1))
    distance, giou = box_losses(boxes, others)
    torch.testing.assert_close(distance, (boxes - others).abs().sum(-1))
    torch.testing.assert_close(giou, 1 - box_overlap(boxes, others)[1])


def test_distance_of_all_pairs_is_that_of_cdist():
    boxes, others = tiny.random_boxes(2, 9), tiny.random_boxes(2, 4)
    expected = torch.cdist(boxes, others, p=1)
    torch.testing.assert_close(box_distance(boxes[:, :, None], others[:, None]), expected)


def test_equal_boxes_cost_nothing():
    distance, giou = box_losses(*[tiny.random_boxes(50, generator=torch.Generator().manual_seed(3)) for _ in range(2)])
    assert distance.abs().max() == 0 and giou.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_boxes_are_compared_in_float32(dtype):
    boxes, others = tiny.random_boxes(8).to(dtype), tiny.random_boxes(8).to(dtype)
    for found, expected in zip(box_losses(boxes, others), box_losses(boxes.float(), others.float()), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected)
