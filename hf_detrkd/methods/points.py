"""Answers of two models to the same queries, compared one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..losses import among_known, box_losses, class_targets, soft_class_loss, softmax_kl
from ..outputs import Predictions
from .base import ComparingConfig, PlacesConfig


@dataclass(frozen=True)
class PointsConfig(ComparingConfig, PlacesConfig):
    """Options of every method that asks both models the same queries."""

    class_loss: Literal["softmax_kl", "bce"] = field(
        default="softmax_kl",
        metadata={
            "help": "KL of tempered softmax [released code], or of each head's own probabilities [ours], which a "
            "sigmoid and a softmax head together always get, and a sigmoid head of one class."
        },
    )
    temperature: float = field(default=10.0, metadata={"help": "Of softmax_kl. [released code: 10]"})

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}.")


def point_losses(student: Predictions, teacher: Predictions, config: PointsConfig) -> Tensor:
    """Class, L1 and `1 - GIoU` loss of every query, `(3, batch_size, num_queries)`."""
    return torch.stack([_class_loss(student, teacher, config), *box_losses(student.boxes, teacher.boxes)])


def _class_loss(student: Predictions, teacher: Predictions, config: PointsConfig) -> Tensor:
    logits = among_known(student, teacher).logits
    alone = student.activation == "sigmoid" and student.num_classes == 1  # a softmax over one class is constant
    if config.class_loss == "bce" or alone or student.activation != teacher.activation:
        return soft_class_loss(logits, class_targets(teacher, student.activation), student.activation)
    return config.temperature**2 * softmax_kl(logits, teacher.logits, config.temperature)


def shares(weight: Tensor) -> Tensor:
    """Weights `(batch_size, num_queries)` that sum to 1 over each image, or to 0 where all are 0."""
    return weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)
