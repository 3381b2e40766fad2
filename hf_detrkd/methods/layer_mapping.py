"""Maps teacher decoder layers to student layers and names per-layer losses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..structures.loss_key import LossKey
from ..structures.outputs import Predictions, stacked


PARTS = ("class", "box", "giou")
"""Compared parts of a prediction (class, L1, GIoU), in the order of all stacked losses."""


def layer_pairs(num_student: int, num_teacher: int) -> list[tuple[int, int, float]]:
    """Pairs every teacher layer with a student layer: teacher layer t (from 1) supervises ceil(t * L_S / L_T).

    Returns:
        `list[tuple[int, int, float]]`: (student layer, teacher layer, weight), layers from 0; the teacher layers of
        one student layer share a weight of 1 (ours: their mean).
    """
    students = [-(-(t + 1) * num_student // num_teacher) - 1 for t in range(num_teacher)]
    return [(s, t, 1 / students.count(s)) for t, s in enumerate(students)]


def stacked_pairs(
    student: Sequence[Predictions], teacher: Sequence[Predictions], pairs: list[tuple[int, int, float]]
) -> tuple[Predictions, Predictions]:
    """The layers of both models pair by pair, [`stacked`]."""
    return stacked([student[s] for s, _, _ in pairs]), stacked([teacher[t] for _, t, _ in pairs])


def per_layer(key: LossKey, values: Tensor, pairs: list[tuple[int, int, float]]) -> dict[LossKey, Tensor]:
    """Loss scalars by student layer, from one value per layer pair `(num_pairs,)`."""
    losses: dict[LossKey, Tensor] = {}
    for (layer, _, weight), value in zip(pairs, values.unbind(), strict=True):
        one = key.at(layer)
        losses[one] = losses[one] + weight * value if one in losses else weight * value
    return losses


def parts_per_layer(
    method: str, terms: Tensor, pairs: list[tuple[int, int, float]], group: str | None = None
) -> dict[LossKey, Tensor]:
    """Loss scalars by part and student layer, from the stacked losses of all parts, `(3, num_pairs)`."""
    losses: dict[LossKey, Tensor] = {}
    for part, values in zip(PARTS, terms.unbind(), strict=True):
        losses |= per_layer(LossKey(method, part, group), values, pairs)
    return losses
