"""One query's answers, their distances, and who is paired with whom.

A layer is a [`Layer`] of plain tensors of one image; everything is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou


@dataclass
class Layer:
    """One image's answers of one decoder layer: `logits` `(N, C)` (softmax: `C + 1`), `boxes` `(N, 4)`, `states`."""

    logits: Tensor
    boxes: Tensor
    activation: str
    states: Tensor | None = None

    def probabilities(self, query: int) -> Tensor:
        logits = self.logits[query]
        return logits.sigmoid() if self.activation == "sigmoid" else logits.softmax(-1)

    def scores(self, query: int) -> Tensor:
        """Without no-object."""
        probabilities = self.probabilities(query)
        return probabilities if self.activation == "sigmoid" else probabilities[:-1]


Answers = list[list[Layer]]
Truth = list[tuple[list[int], Tensor]]  # labels and boxes of each image


def taught_by(num_student: int, num_teacher: int) -> dict[int, list[int]]:
    """Student layer -> the teacher layers that meet there, counted from 1 as in the formula."""
    found: dict[int, list[int]] = {}
    for teacher in range(1, num_teacher + 1):
        found.setdefault(math.ceil(teacher * num_student / num_teacher), []).append(teacher)
    return found


def iou(box: Tensor, other: Tensor) -> Tensor:
    return box_iou(*(box_convert(b[None], "cxcywh", "xyxy") for b in (box, other)))[0, 0]


def giou(box: Tensor, other: Tensor) -> Tensor:
    return generalized_box_iou(*(box_convert(b[None], "cxcywh", "xyxy") for b in (box, other)))[0, 0]


def l1(box: Tensor, other: Tensor) -> Tensor:
    return sum((abs(a - b) for a, b in zip(box, other, strict=True)), torch.zeros((), dtype=box.dtype))


def soft_targets(teacher: Layer, query: int, activation: str) -> Tensor:
    """The teacher's probabilities as the student's kind of head states them."""
    if teacher.activation == activation:
        return teacher.probabilities(query)
    scores = teacher.scores(query)
    if activation == "sigmoid":
        return scores
    row = torch.cat([scores, 1 - scores.max()[None]])
    return row / row.sum()


def cross_entropy(logits: Tensor, targets: Tensor, activation: str) -> Tensor:
    if activation == "softmax":
        return -(targets * logits.log_softmax(-1)).sum()
    return -sum(
        p * torch.log(z.sigmoid()) + (1 - p) * torch.log((-z).sigmoid()) for z, p in zip(logits, targets, strict=True)
    )


def entropy(targets: Tensor, activation: str) -> Tensor:
    total = torch.zeros((), dtype=targets.dtype)
    for p in targets:
        for q in (p, 1 - p) if activation == "sigmoid" else (p,):
            if q > 0:
                total = total - q * q.log()
    return total


def class_divergence(logits: Tensor, targets: Tensor, activation: str) -> Tensor:
    """Cross entropy minus what no student can remove."""
    return cross_entropy(logits, targets, activation) - entropy(targets, activation)


def kl(teacher_logits: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """`sum p_T log(p_T / p_S)`."""
    p, q = (z / temperature for z in (teacher_logits, logits))
    p, q = p.exp() / p.exp().sum(), q.exp() / q.exp().sum()
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


def assign(cost: Tensor) -> list[tuple[int, int]]:
    """Pairs (row, column) of least total cost."""
    if 0 in cost.shape:
        return []
    rows, columns = linear_sum_assignment(cost.detach().numpy())
    return list(zip(rows.tolist(), columns.tolist(), strict=True))
