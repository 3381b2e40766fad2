"""Every function against another algorithm: torchvision, torch.distributions, or a loop written from the formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from hf_detrkd.losses import (
    KINDS,
    box_distance,
    box_losses,
    box_overlap,
    class_targets,
    detection_losses,
    gather_matched,
    hard_class_loss,
    scatter_matched,
    soft_class_loss,
    softmax_kl,
)
from hf_detrkd.outputs import Predictions
from tests import tiny


HEADS = ("sigmoid", "softmax")


# --- boxes -----------------------------------------------------------------------------------------------------------


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


# --- between two detectors -------------------------------------------------------------------------------------------


def predictions(logits: Tensor, activation: str) -> Predictions:
    return Predictions(logits, torch.zeros(*logits.shape[:-1], 4), activation=activation)


def logits_for(activation: str, batch: int = 2, queries: int = 6, classes: int = 5, scale: float = 3.0) -> Tensor:
    return torch.randn(batch, queries, classes + (activation == "softmax")) * scale


@pytest.mark.parametrize("student", HEADS)
@pytest.mark.parametrize("teacher", HEADS)
@pytest.mark.parametrize("scale", [1.0, 10.0, 50.0])
def test_class_targets_are_probabilities_in_the_form_of_the_students_head(student, teacher, scale):
    logits = logits_for(teacher, scale=scale)
    targets = class_targets(predictions(logits, teacher), student)
    assert targets.shape == (2, 6, 5 + (student == "softmax"))
    assert targets.min() >= 0 and targets.max() <= 1
    if student == "softmax":
        torch.testing.assert_close(targets.sum(-1), torch.ones(2, 6))
    torch.testing.assert_close(targets, naive_targets(logits, teacher, student), atol=1e-6, rtol=1e-5)


def naive_targets(logits: Tensor, teacher: str, student: str) -> Tensor:
    rows = []
    for row in logits.flatten(0, -2).double().tolist():
        if teacher == "softmax":
            exponents = [math.exp(value - max(row)) for value in row]
            scores = [value / sum(exponents) for value in exponents]
            scores = scores if student == "softmax" else scores[:-1]
        else:
            scores = [1 / (1 + math.exp(-value)) for value in row]
            if student == "softmax":
                scores = [*scores, 1 - max(scores)]
                scores = [value / sum(scores) for value in scores]
        rows.append(scores)
    return torch.tensor(rows).view(*logits.shape[:-1], -1)


@pytest.mark.parametrize("classes", [1, 5, 80])
@pytest.mark.parametrize("queries", [1, 7])
def test_soft_class_loss_of_a_sigmoid_head_is_the_divergence_of_bernoullis(classes, queries):
    logits, target = torch.randn(2, queries, classes) * 3, torch.rand(2, queries, classes)
    bernoulli = torch.distributions.Bernoulli
    expected = torch.distributions.kl_divergence(
        bernoulli(probs=target.double()), bernoulli(logits=logits.double())
    ).sum(-1)
    torch.testing.assert_close(soft_class_loss(logits, target, "sigmoid").double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("classes", [1, 5, 80])
@pytest.mark.parametrize("queries", [1, 7])
def test_soft_class_loss_of_a_softmax_head_is_the_divergence_of_categoricals(classes, queries):
    logits, target = torch.randn(2, queries, classes + 1) * 3, torch.randn(2, queries, classes + 1).softmax(-1)
    categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(
        categorical(probs=target.double()), categorical(logits=logits.double())
    )
    torch.testing.assert_close(soft_class_loss(logits, target, "softmax").double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", HEADS)
def test_soft_class_loss_has_the_gradient_of_the_cross_entropy(activation):
    logits, target = (
        logits_for(activation).requires_grad_(),
        torch.randn(2, 6, 5 + (activation == "softmax")).softmax(-1),
    )
    (found,) = torch.autograd.grad(soft_class_loss(logits, target, activation).sum(), logits)
    probabilities = logits.sigmoid() if activation == "sigmoid" else logits.softmax(-1)
    torch.testing.assert_close(found, probabilities - target, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("activation", HEADS)
@pytest.mark.parametrize("classes", [5, 80])
@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (-5.0, 2.0), (0.0, 10.0), (0.0, 50.0)])
def test_equal_heads_have_no_loss_and_no_gradient(activation, classes, mean, scale):
    logits = (logits_for(activation, queries=200, classes=classes, scale=scale) + mean).requires_grad_()
    same = predictions(logits.detach(), activation)
    losses = [soft_class_loss(logits, class_targets(same, activation), activation)]
    losses += [softmax_kl(logits, logits.detach(), temperature) for temperature in (1.0, 10.0)]
    for loss in losses:
        assert loss.shape == (2, 200) and loss.abs().max() < 1e-6
        assert torch.autograd.grad(loss.sum(), logits)[0].abs().max() < 1e-6


@pytest.mark.parametrize("activation", HEADS)
@pytest.mark.parametrize("teacher", HEADS)
def test_opposite_extreme_logits_give_finite_losses_and_gradients(activation, teacher):
    logits = torch.full((1, 4, 5 + (activation == "softmax")), -50.0)
    logits[..., 0] = 50.0
    logits.requires_grad_()
    other = torch.full((1, 4, 5 + (teacher == "softmax")), -50.0)
    other[..., 1] = 50.0
    loss = soft_class_loss(logits, class_targets(predictions(other, teacher), activation), activation)
    torch.testing.assert_close(loss, torch.full((1, 4), 100.0))
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
@pytest.mark.parametrize("classes", [2, 5, 80])
def test_softmax_kl_is_the_divergence_of_the_student_from_the_teacher(temperature, classes):
    student, teacher = torch.randn(2, 3, 7, classes) * 3
    categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(
        categorical(logits=teacher / temperature), categorical(logits=student / temperature)
    )
    torch.testing.assert_close(softmax_kl(student, teacher, temperature), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_of_softmax_kl_proves_its_argument_order(temperature):
    student, teacher = torch.randn(5, 8).requires_grad_(), torch.randn(5, 8)
    (found,) = torch.autograd.grad(softmax_kl(student, teacher, temperature).sum(), student)
    expected = (F.softmax(student / temperature, -1) - F.softmax(teacher / temperature, -1)) / temperature
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_softmax_kl_draws_the_student_over_all_modes_of_the_teacher():
    teacher = torch.tensor([5.0, 5.0, -5.0])
    one_mode, both_and_more = torch.tensor([5.0, -5.0, -5.0]), torch.zeros(3)
    assert softmax_kl(one_mode, teacher, 1.0) > 4 * softmax_kl(both_and_more, teacher, 1.0)
    assert softmax_kl(teacher, one_mode, 1.0) < softmax_kl(teacher, both_and_more, 1.0)  # the other order: reversed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_float32(dtype):
    student, teacher = (logits_for("sigmoid").to(dtype) for _ in range(2))
    assert torch.equal(softmax_kl(student, teacher, 2.0), softmax_kl(student.float(), teacher.float(), 2.0))
    target = class_targets(predictions(teacher, "sigmoid"), "sigmoid")
    assert target.dtype == torch.float32
    assert torch.equal(
        soft_class_loss(student, target, "sigmoid"), soft_class_loss(student.float(), target, "sigmoid")
    )


# --- against the ground truth ----------------------------------------------------------------------------------------


def random_index(layers: int, batch: int, queries: int, most: int) -> Tensor:
    """A random assignment with padding and with boxes that found no query."""
    index = torch.full((layers, batch, most), -1)
    for row in index.flatten(0, 1):
        count = min(int(torch.randint(0, most + 1, ())), queries)
        row[torch.randperm(most)[:count]] = torch.randperm(queries)[:count]
    return index


GRID = [(1, 1, 1, 1), (3, 2, 7, 4), (2, 3, 4, 6), (1, 2, 5, 0)]


@pytest.mark.parametrize(("layers", "batch", "queries", "most"), GRID)
def test_values_of_boxes_are_laid_out_by_query(layers, batch, queries, most):
    index, values = random_index(layers, batch, queries, most), torch.rand(layers, batch, most)
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
    values, index = torch.randn(3, 2, 7, 4), random_index(3, 2, 7, 5)
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 5, 20])
@pytest.mark.parametrize(("layers", "batch", "queries", "most"), GRID)
def test_detection_losses_are_those_of_a_loop_over_queries(kind, classes, layers, batch, queries, most):
    columns = classes + (kind == "cross_entropy")
    logits, boxes = torch.randn(layers, batch, queries, columns) * 2, tiny.random_boxes(layers, batch, queries)
    index, labels = random_index(layers, batch, queries, most), torch.randint(0, classes, (batch, most))
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
    index = random_index(2, 2, 6, 3)
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
