"""Proposals, maps and answers at random: what the tests of task-adaptive regularization share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_detrkd.methods import TaskAdaptiveConfig, TaskAdaptiveRegularization
from hf_detrkd.structures.outputs import (
    DetectorOutput,
    DetectorSpec,
    FeatureMap,
    ObjectQueries,
    Predictions,
    Proposals,
)
from hf_detrkd.structures.targets import Targets
from tests import tiny
from tests.methods.fakes import spec


GATES = ("better", "foreground")
CLASSES = 3
DISTANCES = ("task_adaptive_class_0", "task_adaptive_box_0")
PASSES = ("task_adaptive_class_pass", "task_adaptive_box_pass")


def proposing(head: str = "softmax", widths: Sequence[int] = (4,)) -> DetectorSpec:
    return replace(spec(1, 1, CLASSES, head, "boxes", neck=widths), one_to_one=False)


def method_of(
    student: DetectorSpec | None = None, teacher: DetectorSpec | None = None, **options: Any
) -> TaskAdaptiveRegularization:
    specs = student or proposing(), teacher or spec(num_classes=CLASSES, neck=(4,))
    return TaskAdaptiveRegularization(TaskAdaptiveConfig(**options), *specs)


def objects(*images: list[list[float]]) -> Targets:
    """Boxes of class 0."""
    rows = (torch.tensor(boxes).view(-1, 4) for boxes in images)
    return Targets.from_labels([{"class_labels": torch.zeros(len(b), dtype=torch.long), "boxes": b} for b in rows])


def a_map(channels: int, size: tuple[int, int], batch: int, padded: bool = False, trains: bool = False) -> FeatureMap:
    """A random map; the last image of a padded batch has three quarters of the height and half of the width."""
    values = torch.randn(batch, channels, *size).requires_grad_(trains)
    real = torch.ones(batch, *size, dtype=torch.bool)
    if padded:
        real[-1, math.ceil(size[0] * 0.75) :] = False
        real[-1, :, math.ceil(size[1] * 0.5) :] = False
    return FeatureMap(values, ~real if padded else None)


def output(
    maps: Sequence[FeatureMap],
    others: Sequence[FeatureMap] = (),
    answers: Predictions | None = None,
    proposals: Proposals | None = None,
) -> DetectorOutput:
    """A detector that answers every question alike."""
    if answers is None:
        answers = Predictions(torch.zeros(1, 1, CLASSES), torch.full((1, 1, 4), 0.5))
    features = {"neck": tuple(maps), "encoder": tuple(others or maps)}
    own = ObjectQueries(boxes=answers.boxes.detach())
    return DetectorOutput((answers,), own, features, lambda asked: (answers,), proposals=proposals)


def around(boxes: Tensor, spread: float) -> Tensor:
    return (boxes * (1 + spread * torch.randn_like(boxes)).clamp(0.4, 1.6)).clamp(0.01, 0.99)


def proposals_of(targets: Targets, backgrounds: Sequence[int]) -> Proposals:
    """Of every object the box itself and four near it, then background; what is padded looks like an object."""
    rows: list[list[tuple[Tensor, int, Tensor, bool]]] = []
    for label, count in zip(targets.to_labels(), backgrounds, strict=True):
        rows.append([])
        for box, c in zip(label["boxes"], label["class_labels"].tolist(), strict=True):
            rows[-1] += [(box, c, box, True), *((around(box, 0.25), c, box, False) for _ in range(4))]
        rows[-1] += [(tiny.random_boxes(), -1, tiny.random_boxes(), False) for _ in range(count)]
    shape = len(rows), max(map(len, rows))
    found = Proposals(
        tiny.random_boxes(*shape),
        torch.ones(shape, dtype=torch.long),
        tiny.random_boxes(*shape),
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(shape, dtype=torch.bool),
    )
    for image, row in enumerate(rows):
        for n, (box, c, matched, added) in enumerate(row):
            found.boxes[image, n], found.labels[image, n], found.matched[image, n] = box, c, matched
            found.valid[image, n], found.added[image, n] = True, added
    return found


def answers_to(proposals: Proposals, head: str, trains: bool = False, per_class: bool = True) -> Predictions:
    """Random ones near the proposals."""
    shape = proposals.boxes.shape[:2]
    class_boxes = around(proposals.boxes[:, :, None].expand(*shape, CLASSES, 4), 0.15).requires_grad_(trains)
    logits = (2 * torch.randn(*shape, CLASSES + (head == "softmax"))).requires_grad_(trains)
    boxes = tiny.random_boxes(*shape) if per_class else around(proposals.boxes, 0.15)
    return Predictions(logits, boxes, None, head, class_boxes=class_boxes if per_class else None)
