"""Which layer teaches which, and losses by part and layer."""

from __future__ import annotations

from torch import Tensor


PARTS = ("class", "box", "giou")
"""What a query's answer is compared in, in the order of all stacked terms."""


def layer_pairs(num_student: int, num_teacher: int) -> list[tuple[int, int, float]]:
    """Which teacher layer supervises which student layer: teacher layer t (from 1) teaches ceil(t * L_S / L_T).

    Returns:
        `list[tuple[int, int, float]]`: (student layer, teacher layer, weight) from 0; teacher layers that meet in one
        student layer share a weight of 1 (ours: their mean).
    """
    students = [-(-(t + 1) * num_student // num_teacher) - 1 for t in range(num_teacher)]
    return [(s, t, 1 / students.count(s)) for t, s in enumerate(students)]


def per_layer(name: str, values: Tensor, pairs: list[tuple[int, int, float]]) -> dict[str, Tensor]:
    """Scalars by name and student layer, from one value per layer pair `(num_pairs,)`."""
    losses: dict[str, Tensor] = {}
    for (layer, _, weight), value in zip(pairs, values.unbind(), strict=True):
        key = f"{name}_{layer}"
        losses[key] = losses[key] + weight * value if key in losses else weight * value
    return losses


def parts_per_layer(
    name: str, terms: Tensor, pairs: list[tuple[int, int, float]], group: str = ""
) -> dict[str, Tensor]:
    """Scalars `<name>_<part>[_<group>]_<layer>` from the terms of all parts, `(3, num_pairs)`."""
    losses: dict[str, Tensor] = {}
    for part, values in zip(PARTS, terms.unbind(), strict=True):
        losses |= per_layer(f"{name}_{part}{group and '_'}{group}", values, pairs)
    return losses
