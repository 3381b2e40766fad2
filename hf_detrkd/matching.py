"""Hungarian matching, batched: costs of all layers and images on the device, one copy to the host, scipy.

The assignment itself takes a few percent of a matcher's time; the copies and the cost take the rest. So every cost of
a step is computed as one padded tensor and brought over together with [`to_host`].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .losses import box_distance, box_overlap, class_targets
from .outputs import Predictions, Targets


def to_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Copies tensors to the host in float32, in a single transfer; NaN and infinity become the largest number."""
    largest = torch.finfo(torch.float32).max
    flat = torch.cat([t.detach().float().flatten() for t in tensors])
    flat = flat.nan_to_num(nan=largest, posinf=largest, neginf=largest).cpu()
    sizes = [t.numel() for t in tensors]
    return [part.view(t.shape).numpy() for part, t in zip(flat.split(sizes), tensors, strict=True)]


def match_columns(cost: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """The row that an optimal assignment gives to each column.

    Args:
        cost (`np.ndarray` of shape `(num_layers, batch_size, num_rows, max_columns)`)
        counts (`Sequence[int]` of length `batch_size`): columns of each image that are not padding.

    Returns:
        `np.ndarray` of shape `(num_layers, batch_size, max_columns)`, int64; -1 for padding and for columns left over
        where an image has more columns than rows.
    """
    index = np.full((*cost.shape[:2], cost.shape[-1]), -1, dtype=np.int64)
    for layer, image in np.ndindex(*cost.shape[:2]):
        rows, columns = linear_sum_assignment(cost[layer, image, :, : counts[image]])
        index[layer, image, columns] = rows
    return index


@dataclass(frozen=True)
class HungarianMatcher:
    """Weights of the matching cost `class * c + box * |b - b'|_1 - giou * GIoU(b, b')`.

    The class cost against ground truth is `-p` for softmax heads and the difference of the focal terms for sigmoid
    heads (`alpha`, `gamma`), as in DETR and Deformable DETR.
    """

    class_weight: float = 2.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    @torch.no_grad()
    def cost(self, logits: Tensor, boxes: Tensor, targets: Targets, activation: str) -> Tensor:
        """Cost of giving each query to each ground-truth box.

        Args:
            logits (`torch.Tensor` of shape `(num_layers, batch_size, num_queries, num_classes)`)
            boxes (`torch.Tensor` of shape `(num_layers, batch_size, num_queries, 4)`)

        Returns:
            `torch.Tensor` of shape `(num_layers, batch_size, num_queries, max_boxes)`.
        """
        # Probabilities of the ground truth's classes alone: (num_layers, batch_size, num_queries, max_boxes).
        columns = targets.labels[None, :, None, :].expand(*logits.shape[:-1], -1)
        if activation == "softmax":
            class_cost = -logits.float().softmax(-1).gather(-1, columns)
        else:
            scores = logits.float().sigmoid().gather(-1, columns)
            negative = (1 - self.alpha) * scores.pow(self.gamma) * -(1 - scores + 1e-8).log()
            positive = self.alpha * (1 - scores).pow(self.gamma) * -(scores + 1e-8).log()
            class_cost = positive - negative
        return self.class_weight * class_cost + self._box_cost(boxes, targets.boxes)

    @torch.no_grad()
    def cost_between(self, student: Predictions, teacher: Predictions) -> Tensor:
        """Cost of pairing each student query with each teacher query; the class cost is the cross entropy of the
        teacher's probabilities. Returns `(batch_size, student_queries, teacher_queries)`."""
        probabilities, logits = class_targets(teacher, student.activation), student.logits.float()
        if student.activation == "sigmoid":
            # softplus(-z) @ p + softplus(z) @ (1 - p) is the binary cross entropy of every pair.
            softplus = torch.nn.functional.softplus
            class_cost = softplus(-logits) @ probabilities.mT + softplus(logits) @ (1 - probabilities).mT
        else:
            class_cost = -logits.log_softmax(-1) @ probabilities.mT
        return self.class_weight * class_cost + self._box_cost(student.boxes, teacher.boxes)

    def _box_cost(self, boxes: Tensor, others: Tensor) -> Tensor:
        rows, columns = boxes[..., :, None, :], others[..., None, :, :]
        _, giou = box_overlap(rows, columns)
        return self.box_weight * box_distance(rows, columns) - self.giou_weight * giou

    def __call__(self, layers: Sequence[Predictions], targets: Targets) -> Tensor:
        """Matches every layer with the ground truth.

        Returns:
            `torch.LongTensor` of shape `(num_layers, batch_size, max_boxes)`: the query of each box, -1 for padding
            and for boxes that found none.
        """
        logits, boxes = stack_layers(layers)
        (cost,) = to_host([self.cost(logits, boxes, targets, layers[0].activation)])
        return torch.from_numpy(match_columns(cost, targets.counts)).to(logits.device, non_blocking=True)


def stack_layers(layers: Sequence[Predictions]) -> tuple[Tensor, Tensor]:
    """Logits and boxes, both of shape `(num_layers, batch_size, num_queries, ...)`."""
    return torch.stack([layer.logits for layer in layers]), torch.stack([layer.boxes for layer in layers])
