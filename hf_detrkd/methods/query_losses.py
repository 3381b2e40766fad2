"""Per-query losses between student and teacher predictions for shared queries."""

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
    """Options of all methods that decode the same queries with both models."""

    class_loss: Literal["softmax_kl", "bce"] | None = field(
        default=None,
        metadata={
            "help": "bce: KL divergence of the probabilities of the student's head type [ours], always used for pairs "
            "of a sigmoid and a softmax head and for one sigmoid class; softmax_kl: KL divergence of softmax with "
            "temperature [released code], whose gradient can exceed that of the detection loss many times. softmax_kl "
            "of Faster R-CNN students excludes the background, of which a query says nothing. Default: bce; "
            "softmax_kl for Faster R-CNN students."
        },
    )
    temperature: float = field(
        default=10.0,
        metadata={"help": "Softmax temperature of class_loss softmax_kl. Default: 10. [released code: 10]"},
    )

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}.")


def point_losses(student: Predictions, teacher: Predictions, config: PointsConfig, one_to_one: bool = True) -> Tensor:
    """Class, L1 and `1 - GIoU` loss of every query, `(3, ..., batch_size, num_queries)`.

    Args:
        student, teacher ([`Predictions`]): of one layer, or [`stacked`]; one teacher layer can be compared with
            several student layers.
        config ([`PointsConfig`])
        one_to_one (`bool`): [`DetectorSpec.one_to_one`] of the student. If false, `softmax_kl` excludes no-object,
            which then tells how much of an object a box covers and not whether another query predicts the object.
    """
    boxes = as_compared(student, teacher).boxes
    return torch.stack([_class_loss(student, teacher, config, one_to_one), *box_losses(boxes, teacher.boxes)])


def as_compared(student: Predictions, teacher: Predictions) -> Predictions:
    """The student's predictions, with the boxes of the teacher's best class if it predicts a box per class."""
    return replace(student, boxes=student.boxes_of(teacher.scores().argmax(-1)))


def _class_loss(student: Predictions, teacher: Predictions, config: PointsConfig, one_to_one: bool) -> Tensor:
    logits, wanted = among_known(student, teacher).logits, teacher.logits
    softmax = (config.class_loss or ("bce" if one_to_one else "softmax_kl")) == "softmax_kl"
    if one_to_one:
        # The softmax over a single class is constant.
        alone = student.activation == "sigmoid" and student.num_classes == 1
        softmax = softmax and not alone and student.activation == teacher.activation
    elif softmax := softmax and student.num_classes > 1:
        logits, wanted = logits[..., : student.num_classes], wanted[..., : student.num_classes]
    if softmax:
        return config.temperature**2 * softmax_kl(logits, wanted, config.temperature)
    return soft_class_loss(logits, class_targets(teacher, student.activation), student.activation)


def shares(weight: Tensor) -> Tensor:
    """Normalises weights `(batch_size, num_queries)` to sum to 1 over each image, or to 0 if all are 0."""
    return weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)
