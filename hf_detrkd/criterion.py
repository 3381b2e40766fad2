"""The detection loss of every family: equal to transformers' value, with fewer copies, and independent of the number
of processes.

transformers divides by the number of boxes of one process (RT-DETR) or reduces the count twice (DETR, Deformable
DETR), so that the balance of task and distillation loss depends on the machine. Here every divisor is a
[`BatchTotals`], counted over all processes and accumulated micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .losses import detection_losses
from .matching import HungarianMatcher, match_columns, stack_layers, to_host
from .outputs import BatchTotals, Predictions, Targets


@dataclass(frozen=True)
class Denoising:
    """Answers to noised ground truth: `layers` with `2 * max_boxes * num_groups` rows, in every group first the
    positive copies of all boxes, then the negative ones."""

    layers: tuple[Predictions, ...]
    num_groups: int


@dataclass(frozen=True)
class DetectionCriterion:
    """Set-prediction loss over all decoder layers, encoder proposals and denoising queries.

    Args:
        classification (`"cross_entropy"`, `"focal"` or `"varifocal"`): see [`~hf_detrkd.losses.hard_class_loss`].
        matcher ([`HungarianMatcher`])
        class_weight, box_weight, giou_weight (`float`): weights of the three parts.
        no_object_weight (`float`): weight of no-object in the cross entropy.
        alpha, gamma (`float`): of the focal and varifocal loss.
        auxiliary (`bool`): whether layers before the last are supervised too.
        class_agnostic_encoder (`bool`): encoder proposals know only "object", class 0 (two-stage Deformable DETR).
    """

    classification: Literal["cross_entropy", "focal", "varifocal"]
    matcher: HungarianMatcher
    class_weight: float = 1.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    no_object_weight: float = 0.1
    alpha: float = 0.25
    gamma: float = 2.0
    auxiliary: bool = True
    class_agnostic_encoder: bool = False

    def with_auxiliary(self, auxiliary: bool) -> DetectionCriterion:
        """The same loss with every decoder layer supervised, or only the last."""
        return replace(self, auxiliary=auxiliary)

    def __call__(
        self,
        layers: Sequence[Predictions],
        targets: Targets,
        totals: BatchTotals,
        encoder: Predictions | None = None,
        denoising: Denoising | None = None,
    ) -> dict[str, Tensor]:
        """Computes the loss of one batch.

        Args:
            layers (`Sequence[Predictions]`): answers to the model's own queries, last layer last.
            encoder ([`Predictions`], *optional*): proposals of a two-stage encoder.
            denoising ([`Denoising`], *optional*)

        Returns:
            `dict[str, torch.Tensor]`: weighted parts by name (`class`, `box`, `giou`, then the same with `_encoder`
            and `_denoising`), each summed over layers; the loss is their sum.
        """
        layers = layers if self.auxiliary else layers[-1:]
        encoder_targets = targets
        if self.class_agnostic_encoder:
            encoder_targets = replace(targets, labels=torch.zeros_like(targets.labels))
        groups = {"": (layers, targets)} | ({"_encoder": ([encoder], encoder_targets)} if encoder else {})
        losses: dict[str, Tensor] = {}
        with torch.autocast(targets.boxes.device.type, enabled=False):
            costs = [self.matcher.cost(*stack_layers(g), t, g[0].activation) for g, t in groups.values()]
            for (name, (group, target)), cost in zip(groups.items(), to_host(costs), strict=True):
                index = torch.from_numpy(match_columns(cost, targets.counts))
                index = index.to(target.boxes.device, non_blocking=True)
                losses |= self._group(group, index, target, totals, name)
            if denoising is not None:
                losses |= self._denoising(denoising, targets, totals)
        return losses

    def _group(
        self, layers: Sequence[Predictions], index: Tensor, targets: Targets, totals: BatchTotals, name: str
    ) -> dict[str, Tensor]:
        logits, boxes = stack_layers(layers)
        options = {"alpha": self.alpha, "gamma": self.gamma, "no_object_weight": self.no_object_weight}
        classes, distance, giou = detection_losses(
            logits, boxes, index, targets.labels, targets.boxes, self.classification, **options
        )
        divisor = totals.boxes_or_one
        class_divisor = divisor
        if self.classification == "cross_entropy":  # transformers' weighted mean over all queries
            class_divisor = totals.class_weight(logits.shape[2], self.no_object_weight)
        return {
            f"class{name}": self.class_weight * classes.sum() / class_divisor,
            f"box{name}": self.box_weight * distance.sum() / divisor,
            f"giou{name}": self.giou_weight * giou.sum() / divisor,
        }

    def _denoising(self, denoising: Denoising, targets: Targets, totals: BatchTotals) -> dict[str, Tensor]:
        """Positive copies answer for the box that they were made from: no matching."""
        num_groups, most = denoising.num_groups, targets.labels.shape[1]
        group, box = torch.meshgrid(torch.arange(num_groups), torch.arange(most), indexing="ij")
        rows = (group * 2 * most + box).flatten().to(targets.labels.device, non_blocking=True)
        copies = Targets(
            targets.labels.repeat(1, num_groups),
            targets.boxes.repeat(1, num_groups, 1),
            targets.valid.repeat(1, num_groups),
            targets.counts,
        )
        index = torch.where(copies.valid, rows, -1).expand(len(denoising.layers), -1, -1)
        totals = replace(totals, boxes=totals.boxes_or_one * num_groups)
        return self._group(denoising.layers, index, copies, totals, "_denoising")
