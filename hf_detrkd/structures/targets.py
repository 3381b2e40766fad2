"""Ground truth of a batch, and the counts that normalise the losses.

Boxes are `(center_x, center_y, width, height)` in [0, 1] of the image, as in [`~hf_detrkd.structures.outputs`].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch, padded to the image with most boxes. Padded rows hold class 0 and a valid dummy box.

    Attributes:
        labels (`torch.LongTensor` of shape `(batch_size, max_boxes)`)
        boxes (`torch.Tensor` of shape `(batch_size, max_boxes, 4)`)
        valid (`torch.BoolTensor` of shape `(batch_size, max_boxes)`)
        counts (`tuple[int]`): boxes per image, on the host, so that reading them needs no device synchronisation.
    """

    labels: Tensor
    boxes: Tensor
    valid: Tensor
    counts: tuple[int, ...]

    def of_images(self, rows: Tensor | None) -> Targets:
        """Those of the images `rows` `(num_images,)`, a tensor on the host, with the same padding; all for `None`."""
        if rows is None:
            return self
        counts = tuple(self.counts[row] for row in rows.tolist())
        there = rows.to(self.labels.device, non_blocking=True)
        return Targets(self.labels[there], self.boxes[there], self.valid[there], counts)

    @classmethod
    def from_labels(cls, labels: Sequence[dict[str, Tensor]]) -> Targets:
        """Pads the list of dicts (`class_labels`, `boxes`) that the collator returns."""
        counts = tuple(len(label["class_labels"]) for label in labels)
        most, device = max(counts, default=0), labels[0]["boxes"].device
        classes = torch.zeros(len(labels), most, dtype=torch.long, device=device)
        boxes = torch.full((len(labels), most, 4), 0.5, device=device)
        for i, (label, count) in enumerate(zip(labels, counts, strict=True)):
            classes[i, :count] = label["class_labels"]
            boxes[i, :count] = label["boxes"].float().reshape(-1, 4)
        lengths = torch.tensor(counts).to(device, non_blocking=True)
        return cls(classes, boxes, torch.arange(most, device=device) < lengths[:, None], counts)

    def at_least_one_row(self) -> Targets:
        """The same targets, with one row of padding if no image has a box: a decoder needs at least one query."""
        if self.labels.shape[1]:
            return self
        labels, boxes = self.labels.new_zeros(len(self.counts), 1), self.boxes.new_full((len(self.counts), 1, 4), 0.5)
        return Targets(labels, boxes, torch.zeros_like(labels, dtype=torch.bool), self.counts)

    def repeated(self, times: int) -> Targets:
        """Repeats the rows of every image `times` times, padding included; `counts` stay those of the images."""
        if times == 1:
            return self
        return Targets(
            self.labels.repeat(1, times), self.boxes.repeat(1, times, 1), self.valid.repeat(1, times), self.counts
        )

    def to_labels(self) -> list[dict[str, Tensor]]:
        """The list of dicts (`class_labels`, `boxes`) that transformers' models take as `labels`."""
        rows = zip(self.labels, self.boxes, self.counts, strict=True)
        return [{"class_labels": labels[:count], "boxes": boxes[:count]} for labels, boxes, count in rows]


def is_labeled(label: Mapping[str, Any]) -> bool:
    """Whether the labels of an image are known; those without the entry are."""
    return bool(label.get("labeled", True))


def labeled_rows(labels: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """The images whose labels are known, by their place in the batch `(num_images,)`; `None` if all are."""
    known = [is_labeled(label) for label in labels]
    return None if all(known) else torch.tensor([row for row, one in enumerate(known) if one], dtype=torch.long)


def known_labels(labels: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The labels, without the boxes of images that nobody labelled."""

    def emptied(label: dict[str, Any]) -> dict[str, Any]:
        return label | {name: label[name][:0] for name in ("class_labels", "boxes")}

    return [label if is_labeled(label) else emptied(label) for label in labels]


@dataclass(frozen=True)
class BatchTotals:
    """Divisors of the losses: counts over all processes and accumulated micro-batches, divided by the number of both.

    With these divisors, the mean over processes and micro-batches equals the loss of the whole batch in one process.

    Attributes:
        images: number of images.
        boxes: number of ground-truth boxes; losses use `boxes_or_one` to avoid a division by zero.
        matched: number of boxes with a matched query (fewer than `boxes` if an image has more boxes than queries).
        occupied: number of images with a box.
        share: number of micro-batches times processes, by which the counts were divided.
        is_global: whether other processes have the same totals and run the same step.
    """

    images: Tensor | float
    boxes: Tensor | float
    matched: Tensor | float
    occupied: Tensor | float
    share: Tensor | float = 1.0
    is_global: bool = False

    @classmethod
    def of(cls, counts: Sequence[int], num_queries: int) -> BatchTotals:
        """The totals of a single batch in a single process."""
        matched, occupied = sum(min(count, num_queries) for count in counts), sum(count > 0 for count in counts)
        return cls(float(len(counts)), float(sum(counts)), float(matched), float(occupied))

    @classmethod
    def counted(cls, labels: Sequence[Mapping[str, Any]], num_queries: int, share: int) -> Tensor:
        """The counts `(2, 5)` of the images of one process, to be added up over processes: of all images, which the
        methods see, and of those whose labels are known, for the detection loss.

        Args:
            labels: of all images.
            num_queries (`int`)
            share (`int`): number of micro-batches.
        """
        known = [label for label in labels if is_labeled(label)]
        both = (cls.of([len(label["class_labels"]) for label in kind], num_queries) for kind in (labels, known))
        return torch.tensor([[of.images, of.boxes, of.matched, of.occupied, float(share)] for of in both])

    @classmethod
    def from_counts(cls, counts: Tensor) -> BatchTotals:
        """The totals from one row `(5,)` of [`counted`], which has been added up and divided by the shares."""
        images, boxes, matched, occupied, share = counts.unbind()
        return cls(images, boxes, matched, occupied, share, is_global=True)

    @property
    def boxes_or_one(self) -> Tensor | float:
        """Number of boxes, at least one in the whole batch, to avoid a division by zero."""
        return self.or_one(self.boxes)

    def or_one(self, count: Tensor | float) -> Tensor | float:
        """A count as a divisor, at least one in the whole batch."""
        least = 1.0 / self.share
        return count.clamp(min=least) if isinstance(count, Tensor) else max(count, least)

    def repeated(self, times: int) -> BatchTotals:
        """The totals if every box is matched `times` times, once per group of queries."""
        return replace(self, boxes=self.boxes * times, matched=self.matched * times)

    def mean_counts(self, counts: Tensor) -> Tensor:
        """Counts of the current step, averaged over processes."""
        if self.is_global and torch.distributed.is_available() and torch.distributed.is_initialized():
            counts = counts.clone()
            torch.distributed.all_reduce(counts)
            counts = counts / torch.distributed.get_world_size()
        return counts

    def class_weight(self, num_queries: int, no_object_weight: float) -> Tensor | float:
        """Divisor of a cross entropy with weighted no-object: the sum of the weights of all queries."""
        weight = self.matched + no_object_weight * (self.images * num_queries - self.matched)
        tiny = 1e-6  # without a labelled image there is nothing to divide
        return weight.clamp(min=tiny) if isinstance(weight, Tensor) else max(weight, tiny)
