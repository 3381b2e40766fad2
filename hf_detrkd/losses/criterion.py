"""Detection loss of all families: one vectorised implementation, independent of the number of processes.

Values and gradients equal those of transformers' losses except for deliberate corrections (box counts, D-FINE's
auxiliary layers, proposals of two-stage Deformable DETR, class weights, evaluation of LW-DETR): `PAPERS.md` describes
them, `tests/losses/test_criterion_faults.py` shows each fault and its fix. Every divisor is a [`BatchTotals`], counted
over all processes and accumulated micro-batches, so that task and distillation losses keep their balance on any setup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..structures.outputs import Activation, Predictions, stacked
from ..structures.supervision import Supervision
from ..structures.targets import BatchTotals, Targets
from .fine_grained import EdgeDistributions, decoupled_focal, fine_grained_localization
from .functional import gather_matched, hard_class_loss, matched_box_losses
from .matching import HungarianMatcher, match_columns, to_device, to_host, vote


@dataclass(frozen=True)
class Denoising:
    """Predictions for denoising queries.

    Attributes:
        layers (`tuple[Predictions]`): `2 * max_boxes * num_groups` queries, in every group first the positive copies
            of all boxes, then the negative ones.
        num_groups (`int`): number of denoising groups.
        edges ([`EdgeDistributions`], *optional*): their edge distributions, if the family predicts them.
    """

    layers: tuple[Predictions, ...]
    num_groups: int
    edges: EdgeDistributions | None = None

    def of_images(self, rows: Tensor) -> Denoising:
        """Those of the images `rows` `(num_images,)`."""
        edges = None if self.edges is None else self.edges.of_images(rows)
        return replace(self, layers=tuple(layer.of_images(rows) for layer in self.layers), edges=edges)


@dataclass(frozen=True)
class Answers:
    """All predictions that the detection loss supervises in one pass.

    Attributes:
        layers (`tuple[Predictions]`): predictions for the model's own queries, last layer last.
        num_groups (`int`): groups of queries in every layer, each matched with all boxes.
        encoder ([`Predictions`], *optional*): proposals of a two-stage encoder, with the same number of groups.
        denoising ([`Denoising`], *optional*)
        edges ([`EdgeDistributions`], *optional*): edge distributions of the last layers.
        model_losses (`dict[str, torch.Tensor]`, *optional*): scalar losses that the model computed itself, for
            [`ModelCriterion`].
    """

    layers: tuple[Predictions, ...]
    num_groups: int = 1
    encoder: Predictions | None = None
    denoising: Denoising | None = None
    edges: EdgeDistributions | None = None
    model_losses: dict[str, Tensor] | None = None

    def of_images(self, rows: Tensor | None) -> Answers:
        """Those of the images `rows` `(num_images,)`, a tensor on the host; all for `None`. Without any image the
        losses are zero, and still connected with all parameters.

        Raises:
            ValueError: the model computed its loss itself, of all images.
        """
        if rows is None:
            return self
        if self.model_losses is not None:
            raise ValueError("A loss that the model computes itself cannot leave out images without labels.")
        there = rows.to(self.layers[0].logits.device, non_blocking=True)
        layers = tuple(layer.of_images(there) for layer in self.layers)
        encoder = None if self.encoder is None else self.encoder.of_images(there)
        denoising = None if self.denoising is None else self.denoising.of_images(there)
        edges = None if self.edges is None else self.edges.of_images(there)
        return replace(self, layers=layers, encoder=encoder, denoising=denoising, edges=edges)


@dataclass(frozen=True)
class Matched:
    """Predictions of several layers `(num_layers, batch_size, num_queries, ...)` with the query matched to each box.

    `index` and `box_index` have the shape `(num_layers, batch_size, max_boxes)`; `box_index`, `box_targets` and
    `box_count` are set if the box losses use another matching than the class loss.
    """

    logits: Tensor
    boxes: Tensor
    targets: Targets
    index: Tensor
    totals: BatchTotals
    edges: EdgeDistributions | None = None
    box_index: Tensor | None = None
    box_targets: Tensor | None = None
    box_count: Tensor | None = None


@dataclass(frozen=True)
class PredictionSet:
    """Stacked predictions of several layers `(num_layers, batch_size, num_queries, ...)` with their targets."""

    name: str
    logits: Tensor
    boxes: Tensor
    activation: Activation
    targets: Targets

    @classmethod
    def of(cls, name: str, layers: Sequence[Predictions], targets: Targets) -> PredictionSet:
        answers = stacked(layers)
        return cls(name, answers.logits, answers.boxes, answers.activation, targets)


@dataclass(frozen=True)
class DetectionCriterion(Supervision):
    """Set-prediction loss over all decoder layers, query groups, encoder proposals and denoising queries.

    Args:
        classification, class_weight, ...: see [`Supervision`].
        matcher ([`HungarianMatcher`])
        fgl_weight, ddf_weight (`float`): weights of the FGL and DDF losses of edge distributions (D-FINE).
        auxiliary (`bool`): whether layers before the last are supervised too.
        class_agnostic_encoder (`bool`): all encoder proposals have class 0, "object" (two-stage Deformable DETR).
        dense_boxes (`bool`): a query matched in any layer gets a box loss in every layer (DEIM's union of matchings).
    """

    matcher: HungarianMatcher
    fgl_weight: float = 0.15
    ddf_weight: float = 1.5
    auxiliary: bool = True
    class_agnostic_encoder: bool = False
    dense_boxes: bool = False

    def with_auxiliary(self, auxiliary: bool) -> DetectionCriterion:
        """The same criterion with all decoder layers supervised, or only the last."""
        return replace(self, auxiliary=auxiliary)

    def __call__(self, answers: Answers, targets: Targets, totals: BatchTotals) -> dict[str, Tensor]:
        """Computes the loss of one batch: [`costs`], copies them to the host, then [`losses`].

        Returns:
            `dict[str, torch.Tensor]`: weighted parts by name (`class`, `box`, `giou`, `fgl`, `ddf`, and the same with
            suffix `_encoder` and `_denoising`), each summed over layers; the loss is their sum.
        """
        return compute_alone(self, answers, targets, totals)

    @torch.no_grad()
    def costs(self, answers: Answers, targets: Targets) -> list[Tensor]:
        """Matching costs of the decoder's and the encoder's predictions, `(num_layers, batch_size, num_queries,
        max_boxes)` each."""
        with torch.autocast(targets.boxes.device.type, enabled=False):
            return [
                self.matcher.cost(one.logits, one.boxes, one.targets, one.activation)
                for one in self._sets(answers, targets)
            ]

    def losses(
        self, answers: Answers, targets: Targets, totals: BatchTotals, host_costs: Sequence[np.ndarray]
    ) -> dict[str, Tensor]:
        """Weighted loss parts by layer.

        Args:
            answers ([`Answers`])
            targets ([`Targets`])
            totals ([`BatchTotals`])
            host_costs (`Sequence[np.ndarray]`): the [`costs`] on the host.

        Returns:
            `dict[str, torch.Tensor]`: each of shape `(num_layers,)`.
        """
        sets = self._sets(answers, targets)
        matched = self._matched(host_costs, sets, totals, answers)
        losses: dict[str, Tensor] = {}
        with torch.autocast(targets.boxes.device.type, enabled=False):
            for one, pairs in zip(sets, matched, strict=True):
                losses |= self._losses(pairs, one.name)
            if answers.denoising is not None:
                losses |= self._losses(denoising_set(answers.denoising, targets, totals), "_denoising")
        return losses

    def _sets(self, answers: Answers, targets: Targets) -> list[PredictionSet]:
        """The prediction sets to match with boxes: of the decoder, then of a two-stage encoder if present."""
        layers = answers.layers if self.auxiliary else answers.layers[-1:]
        sets = [PredictionSet.of("", layers, targets)]
        if answers.encoder is not None:
            if self.class_agnostic_encoder:
                targets = replace(targets, labels=torch.zeros_like(targets.labels))
            sets.append(PredictionSet.of("_encoder", [answers.encoder], targets))
        return sets

    def _matched(
        self, costs: Sequence[np.ndarray], sets: Sequence[PredictionSet], totals: BatchTotals, answers: Answers
    ) -> list[Matched]:
        """Solves the assignments of every set and moves them to the device."""
        targets, groups = sets[0].targets, answers.num_groups
        device, totals = targets.boxes.device, totals.repeated(groups)
        indices = [match_columns(cost, targets.counts, groups) for cost in costs]
        pairs = vote(indices, costs[0].shape[2]) if self.dense_boxes else ()  # two (batch_size, max_pairs)
        sent = to_device([*indices, *pairs], device)
        matched = [
            Matched(one.logits, one.boxes, one.targets.repeated(groups), index, totals)
            for one, index in zip(sets, sent, strict=False)
        ]
        if pairs:
            rows, columns = sent[-2:]
            wanted = gather_matched(targets.boxes, columns)  # (batch_size, max_pairs, 4)
            count = totals.mean_counts(torch.full((), float((pairs[0] >= 0).sum()), device=device))
            matched = [
                replace(one, box_index=rows.expand(len(one.index), -1, -1), box_targets=wanted, box_count=count)
                for one in matched
            ]
        edges = answers.edges if self.auxiliary or answers.edges is None else answers.edges.last()
        return [replace(matched[0], edges=edges), *matched[1:]]

    def _losses(self, one: Matched, name: str) -> dict[str, Tensor]:
        distance, giou, ious = matched_box_losses(one.boxes, one.index, one.targets.boxes)
        kind, options = self.classification, self.class_options
        classes = hard_class_loss(one.logits, one.index, one.targets.labels, kind, ious, **options)
        divisor = class_divisor = one.totals.boxes_or_one
        if self.classification == "cross_entropy":  # weighted mean over all queries, as in transformers
            class_divisor = one.totals.class_weight(one.logits.shape[2], self.no_object_weight)
        index, wanted = one.index, one.targets.boxes
        if one.box_index is not None and one.box_targets is not None and one.box_count is not None:
            index, wanted, divisor = one.box_index, one.box_targets, one.box_count.clamp(min=1e-6)
            distance, giou, ious = matched_box_losses(one.boxes, index, wanted)
        losses = {
            f"class{name}": self.class_weight * classes / class_divisor,
            f"box{name}": self.box_weight * distance / divisor,
            f"giou{name}": self.giou_weight * giou / divisor,
        }
        if one.edges is not None:
            num_layers = len(one.edges.logits)
            index, ious = index[-num_layers:], ious[-num_layers:]
            fgl = fine_grained_localization(one.edges, index, wanted, ious)
            losses[f"fgl{name}"] = self.fgl_weight * fgl / divisor
            if num_layers > 1:
                losses[f"ddf{name}"] = self.ddf_weight * self._ddf(one, one.edges, index, ious)[None]
        return losses

    def _ddf(self, one: Matched, edges: EdgeDistributions, index: Tensor, ious: Tensor) -> Tensor:
        """Means over matched and unmatched edges, weighted with the square roots of their counts (D-FINE's DDF)."""
        matched, others = decoupled_focal(edges, index, ious, one.logits[-1])
        count: Any = one.totals.matched if one.box_count is None else one.box_count
        rest = one.totals.images * one.logits.shape[2] - count
        # If one kind is missing, its sum is zero, and so is its quotient.
        roots = ((4 * count) ** 0.5 + 1e-6, abs(4 * rest) ** 0.5 + 1e-6)
        return (matched.sum() / roots[0] + others.sum() / roots[1]) / (roots[0] + roots[1])


@dataclass(frozen=True)
class ModelCriterion:
    """Uses the loss that the model computes itself: for families without a set-prediction loss, or to compare with
    transformers' own loss, its faults included."""

    def with_auxiliary(self, auxiliary: bool) -> ModelCriterion:
        return self

    def __call__(self, answers: Answers, targets: Targets, totals: BatchTotals) -> dict[str, Tensor]:
        return compute_alone(self, answers, targets, totals)

    def costs(self, answers: Answers, targets: Targets) -> list[Tensor]:
        return []

    def losses(
        self, answers: Answers, targets: Targets, totals: BatchTotals, host_costs: Sequence[np.ndarray]
    ) -> dict[str, Tensor]:
        assert answers.model_losses is not None
        return {name: value[None] for name, value in answers.model_losses.items()}


def compute_alone(
    criterion: DetectionCriterion | ModelCriterion, answers: Answers, targets: Targets, totals: BatchTotals
) -> dict[str, Tensor]:
    """Computes one criterion, with its own transfer of the costs, and sums its parts over layers."""
    host_costs = to_host(criterion.costs(answers, targets))
    losses = criterion.losses(answers, targets, totals, host_costs)
    return {name: layers.sum() for name, layers in losses.items()}


def denoising_set(denoising: Denoising, targets: Targets, totals: BatchTotals) -> Matched:
    """Assigns every positive copy to the box that it was made from: no matching is needed."""
    num_groups, most = denoising.num_groups, targets.labels.shape[1]
    group, box = torch.meshgrid(torch.arange(num_groups), torch.arange(most), indexing="ij")
    rows = (group * 2 * most + box).flatten().to(targets.labels.device, non_blocking=True)  # (num_groups * max_boxes,)
    copies = targets.repeated(num_groups)
    index = torch.where(copies.valid, rows, -1).expand(len(denoising.layers), -1, -1)
    counts = replace(totals, boxes=totals.boxes_or_one * num_groups, matched=totals.boxes * num_groups)
    answers = stacked(denoising.layers)
    return Matched(answers.logits, answers.boxes, copies, index, counts, denoising.edges)
