"""Answers of two models to the same queries, compared one by one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ..losses.functional import among_known, box_losses, class_targets, soft_class_loss, softmax_kl
from ..structures.outputs import Predictions
from .base import ComparingConfig
from .queries import PlacesConfig


@dataclass(frozen=True)
class PointsConfig(ComparingConfig, PlacesConfig):
    """Options of every method that asks both models the same queries."""

    class_loss: Literal["softmax_kl", "bce"] = field(
        default="softmax_kl",
        metadata={
            "help": "KL of tempered softmax [released code], or of each head's own probabilities [ours], which a "
            "sigmoid and a softmax head together always get, and a sigmoid head of one class. Faster R-CNN students "
            "compare softmax_kl without background."
        },
    )
    temperature: float = field(default=10.0, metadata={"help": "Of softmax_kl. [released code: 10]"})

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}.")


def point_losses(student: Predictions, teacher: Predictions, config: PointsConfig, one_to_one: bool = True) -> Tensor:
    """Class, L1 and `1 - GIoU` loss of every query, `(3, batch_size, num_queries)`.

    Args:
        student, teacher ([`Predictions`]): see [`as_compared`].
        config ([`PointsConfig`])
        one_to_one (`bool`): of the student. If not, no-object is left out of the class loss: it says how much of an
            object a box holds, and not whether another query already answers for it.
    """
    boxes = as_compared(student, teacher).boxes
    return torch.stack([_class_loss(student, teacher, config, one_to_one), *box_losses(boxes, teacher.boxes)])


def as_compared(student: Predictions, teacher: Predictions) -> Predictions:
    """The student's answers with its boxes of the teacher's best class, where it has a box for every class."""
    return replace(student, boxes=student.boxes_of(teacher.scores().argmax(-1)))


def _class_loss(student: Predictions, teacher: Predictions, config: PointsConfig, one_to_one: bool) -> Tensor:
    logits, wanted = among_known(student, teacher).logits, teacher.logits
    softmax = config.class_loss == "softmax_kl"
    if one_to_one:
        # A softmax over one class is constant.
        alone = student.activation == "sigmoid" and student.num_classes == 1
        softmax = softmax and not alone and student.activation == teacher.activation
    elif softmax := softmax and student.num_classes > 1:
        logits, wanted = logits[..., : student.num_classes], wanted[..., : student.num_classes]
    if softmax:
        return config.temperature**2 * softmax_kl(logits, wanted, config.temperature)
    return soft_class_loss(logits, class_targets(teacher, student.activation), student.activation)


def shares(weight: Tensor) -> Tensor:
    """Weights `(batch_size, num_queries)` that sum to 1 over each image, or to 0 where all are 0."""
    return weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)
