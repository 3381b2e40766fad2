"""KD-DETR (section 2): answers `[layer][image]` to the same queries."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.methods.naive.answers import Answers, Layer, class_divergence, giou, kl, l1, soft_targets, taught_by


def kd_detr(
    student: Answers,
    teacher: Answers,
    released: bool = False,
    tempered: bool = True,
    foreground: bool = True,
    last: bool = True,
    temperature: float = 10.0,
) -> dict[tuple[str, int], Tensor]:
    """The unweighted losses of one group of points by part and student layer (from 0)."""
    depths = len(student), len(teacher)
    taught = {s: [depths[1]] for s in range(1, depths[0] + 1)} if last else taught_by(*depths)
    losses = {}
    for s, teachers in taught.items():
        sums = [
            _kd_detr_layer(student[s - 1], teacher[t - 1], teacher[-1], released, tempered, foreground, temperature)
            for t in teachers
        ]
        for part in ("class", "box", "giou"):
            losses[part, s - 1] = sum(found[part] for found in sums) / len(sums)
    return losses


def _kd_detr_layer(
    student: list[Layer],
    teacher: list[Layer],
    last: list[Layer],
    released: bool,
    tempered: bool,
    foreground: bool,
    temperature: float,
) -> dict[str, Tensor]:
    sums = dict.fromkeys(("class", "box", "giou"), torch.zeros((), dtype=torch.float64))
    weights = [[image.scores(i).max() if foreground else 1.0 for i in range(len(image.boxes))] for image in last]
    everything = sum(sum(row) for row in weights)
    for image, row in enumerate(weights):
        for i, weight in enumerate(row):
            mine, wanted = student[image], teacher[image]
            if tempered and mine.activation == wanted.activation:
                divergence = temperature**2 * kl(wanted.logits[i], mine.logits[i], temperature)
            else:
                targets = soft_targets(wanted, i, mine.activation)
                divergence = class_divergence(mine.logits[i], targets, mine.activation)
            distance, generalized = l1(mine.boxes[i], wanted.boxes[i]), giou(mine.boxes[i], wanted.boxes[i])
            if released:
                sums["class"] = sums["class"] + weight * divergence / len(mine.scores(i))
                sums["box"] = sums["box"] + weight * distance / 4 / everything
                sums["giou"] = sums["giou"] + weight * (1 - generalized) / everything
            else:
                share = weight / sum(row) / len(weights)
                sums["class"] = sums["class"] + share * divergence
                sums["box"] = sums["box"] + share * distance
                sums["giou"] = sums["giou"] + share * (1 - generalized)
    return sums
