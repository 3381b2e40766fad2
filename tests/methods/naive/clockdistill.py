"""CLoCKDistill (section 3): the memory on objects and beside them, and the answers to one query per box."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.methods.naive.answers import Answers, Layer, Truth
from tests.methods.naive.points import kd_detr


def bilinear(features: Tensor, height: int, width: int) -> Tensor:
    """`(D, h, w)` on another grid: every cell is read at its centre, between the four cells around it."""
    resized = torch.zeros(features.shape[0], height, width, dtype=torch.float64)
    last = features.shape[1] - 1, features.shape[2] - 1
    for y in range(height):
        for x in range(width):
            place = (y + 0.5) * features.shape[1] / height - 0.5, (x + 0.5) * features.shape[2] / width - 0.5
            (top, left), total = map(math.floor, place), torch.zeros(features.shape[0], dtype=torch.float64)
            for row in (top, top + 1):
                for column in (left, left + 1):
                    share = (1 - abs(place[0] - row)) * (1 - abs(place[1] - column))
                    nearest = features[:, min(max(row, 0), last[0]), min(max(column, 0), last[1])]
                    total = total + share * nearest
            resized[:, y, x] = total
    return resized


def cells_of(box: Tensor, height: int, width: int) -> list[tuple[int, int]]:
    """Cells (y, x) that a box touches, on a map of `height` x `width` real cells: at least one. An edge that rounding
    alone pushes over a cell's border stays on it."""
    cx, cy, w, h = box.tolist()
    sides = []
    for center, size, cells in ((cy, h, height), (cx, w, width)):
        first = math.floor(round((center - size / 2) * cells, 4))
        last = math.ceil(round((center + size / 2) * cells, 4)) - 1
        first = min(max(first, 0), cells - 1)
        sides.append(range(first, max(min(last, cells - 1), first) + 1))
    return [(y, x) for y in sides[0] for x in sides[1]]


def clockdistill_memory(
    projected: Tensor,
    memory: Tensor,
    real: Tensor,
    truth: Truth,
    own_real: Tensor,
    alpha: float = 5e-5,
    beta: float = 1e-7,
) -> tuple[Tensor, Tensor]:
    """One level of one batch: the parts on objects and on the rest.

    Args:
        projected: the student's map in the teacher's width, `(B, D, h, w)`, on any grid.
        memory: the teacher's, `(B, D, height, width)`.
        real: cells that are image, `(B, height, width)`: a rectangle from the upper left corner.
        own_real: the same of the student, `(B, h, w)`. Where the grids differ, image lies on image.
    """
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
    for image, (_, boxes) in enumerate(truth):
        cells = real[image].nonzero().tolist()
        height, width = (max(cell[side] for cell in cells) + 1 for side in (0, 1))
        inside = [cells_of(box, height, width) for box in boxes]
        background = [cell for cell in map(tuple, cells) if not any(cell in found for found in inside)]
        mine = projected[image]
        if own_real[image].shape != real[image].shape or not own_real[image].equal(real[image]):
            own = own_real[image].nonzero().tolist()
            own_height, own_width = (max(cell[side] for cell in own) + 1 for side in (0, 1))
            mine = bilinear(mine[:, :own_height, :own_width], height, width)
        for y, x in map(tuple, cells):
            squares = sum((a - b) ** 2 for a, b in zip(mine[:, y, x], memory[image, :, y, x], strict=True))
            areas = [len(found) for found in inside if (y, x) in found]
            share = 1 / min(areas) if areas else 1 / len(background)
            part = 0 if areas else 1
            sums[part] = sums[part] + (beta if part else alpha) * share * squares / len(truth)
    return sums[0], sums[1]


def clockdistill_queries(
    student: Answers, teacher: Answers, counts: list[int], tempered: bool = True, temperature: float = 10.0
) -> dict[tuple[str, int], Tensor]:
    """The answers to one query per box, of which an image has `counts`; unweighted, by part and student layer. Images
    without boxes count nothing."""

    def real(answers: Answers) -> Answers:
        return [
            [
                Layer(image.logits[:count], image.boxes[:count], image.activation)
                for image, count in zip(layer, counts, strict=True)
                if count or not any(counts)
            ]
            for layer in answers
        ]

    return kd_detr(real(student), real(teacher), tempered=tempered, last=False, temperature=temperature)
