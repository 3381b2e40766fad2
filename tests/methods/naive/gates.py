"""The gate, after Sun et al. (section 4): where the teacher is better."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.methods.naive.answers import Layer, Truth, iou


def better_answers(student: list[Layer], teacher: list[Layer], truth: Truth) -> Tensor:
    """One layer's answers to the same queries: 1 where the teacher's class (row 0) or box (1, 2) is better."""
    found = torch.zeros(3, len(truth), len(teacher[0].boxes))
    for image, (labels, boxes) in enumerate(truth):
        for i, theirs in enumerate(teacher[image].boxes):
            overlaps = [float(iou(theirs, box)) for box in boxes]
            if max(overlaps, default=0.0) < 0.5:
                continue
            k = overlaps.index(max(overlaps))
            scores = [float(side[image].scores(i)[labels[k]]) for side in (student, teacher)]
            found[0, image, i] = scores[1] > scores[0]
            found[1:, image, i] = overlaps[k] > float(iou(student[image].boxes[i], boxes[k]))
    return found


def better_objects(student: list[Layer], teacher: list[Layer], truth: Truth) -> list[list[bool]]:
    """By image and object."""
    found: list[list[bool]] = []
    for image, (labels, boxes) in enumerate(truth):
        found.append([])
        for label, box in zip(labels, boxes, strict=True):
            best = []
            for side in (student[image], teacher[image]):
                rows = range(len(side.boxes))
                best.append(max(float(side.scores(i)[label] * iou(side.boxes[i], box)) for i in rows))
            found[-1].append(best[1] > best[0])
    return found
