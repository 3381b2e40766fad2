"""The loss by which a detector family trains its queries on the ground truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Supervision:
    """Kind and weights of the loss of queries that are matched with the ground truth.

    Attributes:
        classification (`str`): see [`~hf_detrkd.losses.functional.hard_class_loss`].
        class_weight, box_weight, giou_weight (`float`): weights of the class, L1 and GIoU losses.
        no_object_weight (`float`): weight of no-object in the cross entropy.
        alpha, gamma (`float`): parameters of the focal-type classification losses.
    """

    classification: Literal["cross_entropy", "focal", "varifocal", "matchability", "iou_aware"]
    class_weight: float = field(default=1.0, kw_only=True)
    box_weight: float = field(default=5.0, kw_only=True)
    giou_weight: float = field(default=2.0, kw_only=True)
    no_object_weight: float = field(default=0.1, kw_only=True)
    alpha: float = field(default=0.25, kw_only=True)
    gamma: float = field(default=2.0, kw_only=True)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each part of the loss: `class`, `box` and `giou`."""
        return {"class": self.class_weight, "box": self.box_weight, "giou": self.giou_weight}

    @property
    def class_options(self) -> dict[str, float]:
        """Keyword arguments of [`~hf_detrkd.losses.functional.hard_class_loss`]."""
        return {"alpha": self.alpha, "gamma": self.gamma, "no_object_weight": self.no_object_weight}
