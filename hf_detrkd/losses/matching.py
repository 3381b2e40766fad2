"""Batched Hungarian matching: costs of all layers and images on the device, one copy to the host, scipy.

The assignment itself takes a few percent of the matching time; computing and copying the costs takes the rest. All
costs of a step, of the detection loss and of the methods, are therefore padded tensors that are copied in one
transfer: see [`to_host_by_group`].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..structures.outputs import Predictions, stacked
from ..structures.targets import Targets
from .functional import among_known, box_distance, box_overlap, class_targets


def to_host_by_group(groups: Sequence[Sequence[Tensor]]) -> list[list[np.ndarray]]:
    """Copies the costs of several losses to the host in one transfer.

    Args:
        groups (`Sequence[Sequence[torch.Tensor]]`): the cost tensors of each loss.

    Returns:
        `list[list[np.ndarray]]`: the same costs on the host, see [`to_host`].
    """
    host = iter(to_host([cost for costs in groups for cost in costs]))
    return [[next(host) for _ in range(len(costs))] for costs in groups]


def to_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Copies tensors to the host in float32, in a single transfer; NaN and infinity become the largest number."""
    if not tensors:
        return []
    largest = torch.finfo(torch.float32).max
    flat = torch.cat([t.detach().float().flatten() for t in tensors])
    flat = flat.nan_to_num(nan=largest, posinf=largest, neginf=largest).cpu()
    sizes = [t.numel() for t in tensors]
    return [part.view(t.shape).numpy() for part, t in zip(flat.split(sizes), tensors, strict=True)]


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copies int64 arrays to the device in a single transfer, on CUDA from pinned memory without blocking the host."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    flat = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def match_columns(cost: np.ndarray, counts: Sequence[int], num_groups: int = 1) -> np.ndarray:
    """Row (query) that the optimal assignment gives to each column (ground-truth box).

    Args:
        cost (`np.ndarray` of shape `(num_layers, batch_size, num_groups * num_rows, max_columns)`)
        counts (`Sequence[int]` of length `batch_size`): columns of each image that are not padding.
        num_groups (`int`): groups of rows, each matched with all columns.

    Returns:
        `np.ndarray` of shape `(num_layers, batch_size, num_groups * max_columns)`, int64; -1 for padding and for
        unmatched columns of an image with more columns than rows.
    """
    num_layers, batch_size, num_rows, most = cost.shape
    num_rows //= num_groups
    index = np.full((num_layers, batch_size, num_groups, most), -1, dtype=np.int64)
    for layer, image, group in np.ndindex(*index.shape[:3]):
        first = group * num_rows
        rows, columns = linear_sum_assignment(cost[layer, image, first : first + num_rows, : counts[image]])
        index[layer, image, group, columns] = first + rows
    return index.reshape(num_layers, batch_size, num_groups * most)


def vote(indices: Sequence[np.ndarray], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """For every query matched in any layer, the box chosen by majority vote over layers (the first one on ties).

    Args:
        indices (`Sequence[np.ndarray]` of shape `(num_layers, batch_size, max_columns)`): see [`match_columns`].
        num_rows (`int`)

    Returns:
        `tuple` of two `np.ndarray` of shape `(batch_size, max_pairs)`, int64: queries, -1 for padding, and boxes.
    """
    stacked = np.concatenate(indices)
    _, batch_size, most = stacked.shape
    votes = np.zeros((batch_size, num_rows + 1, max(most, 1)), dtype=np.int64)
    images, columns = np.indices(stacked.shape)[1:]
    np.add.at(votes, (images, stacked, columns), 1)  # -1 counts into the extra last row
    votes = votes[:, :-1]  # (batch_size, num_rows, max_columns)
    chosen = votes.max(-1) > 0
    pairs = np.full((2, batch_size, chosen.sum(-1).max(initial=0)), -1, dtype=np.int64)
    for image in range(batch_size):
        rows = chosen[image].nonzero()[0]
        pairs[:, image, : len(rows)] = rows, votes[image, rows].argmax(-1)
    return pairs[0], pairs[1].clip(0)


@dataclass(frozen=True)
class HungarianMatcher:
    """Matching cost `class_weight * c + box_weight * |b - b'|_1 - giou_weight * GIoU(b, b')`.

    The class cost `c` against the ground truth is `-p` for softmax heads (DETR) and the difference of the positive and
    the negative focal term (`alpha`, `gamma`) for sigmoid heads (Deformable DETR).
    """

    class_weight: float = 2.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    @torch.no_grad()
    def cost(self, logits: Tensor, boxes: Tensor, targets: Targets, activation: str) -> Tensor:
        """Cost of matching each query with each ground-truth box.

        Args:
            logits (`torch.Tensor` of shape `(num_layers, batch_size, num_queries, num_classes)`)
            boxes (`torch.Tensor` of shape `(num_layers, batch_size, num_queries, 4)`)

        Returns:
            `torch.Tensor` of shape `(num_layers, batch_size, num_queries, max_boxes)`.
        """
        # Only the probabilities of the ground-truth classes: (num_layers, batch_size, num_queries, max_boxes).
        columns = targets.labels[None, :, None, :].expand(*logits.shape[:-1], -1)
        if activation == "softmax":
            class_cost = -logits.float().softmax(-1).gather(-1, columns)
        else:
            scores = logits.float().sigmoid().gather(-1, columns)
            negative = (1 - self.alpha) * scores.pow(self.gamma) * -(1 - scores + 1e-8).log()
            positive = self.alpha * (1 - scores).pow(self.gamma) * -(scores + 1e-8).log()
            class_cost = positive - negative
        return self.class_weight * class_cost + self.box_cost(boxes, targets.boxes)

    def cost_of_layers(self, layers: Sequence[Predictions], targets: Targets) -> Tensor:
        """The [`cost`] for predictions of several layers."""
        answers = stacked(layers)
        return self.cost(answers.logits, answers.boxes, targets, answers.activation)

    @torch.no_grad()
    def cost_between(self, student: Predictions, teacher: Predictions) -> Tensor:
        """Cost of pairing each student query with each teacher query; the class cost is the cross entropy of the
        teacher's probabilities. Returns `(..., batch_size, student_queries, teacher_queries)`."""
        probabilities = class_targets(teacher, student.activation)
        logits = among_known(student, teacher).logits.float()
        if student.activation == "sigmoid":
            # softplus(-z) @ p + softplus(z) @ (1 - p) is the binary cross entropy of every pair.
            softplus = torch.nn.functional.softplus
            class_cost = softplus(-logits) @ probabilities.mT + softplus(logits) @ (1 - probabilities).mT
        else:
            class_cost = -logits.log_softmax(-1) @ probabilities.mT
        return self.class_weight * class_cost + self.box_cost(student.boxes, teacher.boxes)

    @torch.no_grad()
    def box_cost(self, boxes: Tensor, others: Tensor) -> Tensor:
        """L1 and GIoU cost of pairing each box `(..., rows, 4)` with each other box `(..., columns, 4)`."""
        rows, columns = boxes[..., :, None, :], others[..., None, :, :]  # broadcast to (..., rows, columns, 4)
        _, giou = box_overlap(rows, columns)
        return self.box_weight * box_distance(rows, columns) - self.giou_weight * giou

    def __call__(self, layers: Sequence[Predictions], targets: Targets) -> Tensor:
        """Matches every layer with the ground truth.

        Returns:
            `torch.LongTensor` of shape `(num_layers, batch_size, max_boxes)`: the query matched to each box, -1 for
            padding and for unmatched boxes.
        """
        (cost,) = to_host([self.cost_of_layers(layers, targets)])
        return torch.from_numpy(match_columns(cost, targets.counts)).to(layers[0].logits.device, non_blocking=True)


def positives(index: np.ndarray, num_queries: int) -> np.ndarray:
    """Mask of teacher queries that are matched to a box: bool of shape `(num_layers, batch_size, num_queries)`."""
    chosen = np.zeros((*index.shape[:2], num_queries + 1), dtype=bool)
    np.put_along_axis(chosen, np.where(index < 0, num_queries, index), True, axis=-1)
    return chosen[..., :num_queries]


def pair_positives_first(cost: np.ndarray, others_cost: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Student query of each teacher query: positives are matched first, the others with the remaining student queries.

    Args:
        cost, others_cost (`np.ndarray` of shape `(num_layers, batch_size, student_queries, teacher_queries)`): of
            positives, and of the others.
        positive (`np.ndarray` of shape `(num_layers, batch_size, teacher_queries)`)

    Returns:
        `np.ndarray` of shape `(num_layers, batch_size, teacher_queries)`, -1 where the student has too few queries.
    """
    pairing = np.full(positive.shape, -1, dtype=np.int64)
    for layer, image in np.ndindex(*cost.shape[:2]):
        free = np.ones(cost.shape[2], dtype=bool)
        for values, chosen in ((cost, positive[layer, image]), (others_cost, ~positive[layer, image])):
            candidates, columns = free.nonzero()[0], chosen.nonzero()[0]
            rows, taken = linear_sum_assignment(values[layer, image][np.ix_(candidates, columns)])
            pairing[layer, image, columns[taken]] = candidates[rows]
            free[candidates[rows]] = False
    return pairing
