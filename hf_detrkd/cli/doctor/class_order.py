"""Detects permuted class orders from a teacher's predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from .teacher_views import Columns, Seen, overlaps


def confusion(seen: Sequence[Seen], classes: int, named: int) -> np.ndarray:
    """Confusion matrix of the objects' classes and the teacher's, `(classes, named)`: by the best detection that
    overlaps an object with an IoU of 0.5 or more."""
    counts = np.zeros((classes, named), dtype=int)
    for image in seen:
        if len(image.truth) == 0:
            continue
        close = overlaps(image.truth, image.boxes) >= 0.5
        for label, row in zip(image.labels.tolist(), close, strict=True):
            if row.any():
                counts[label, image.named[row.argmax()]] += 1
    return counts


def renamed(counts: np.ndarray, columns: Columns) -> dict[int, int]:
    """Classes for which the teacher's predictions clearly contradict the class map, and the predicted classes.

    Args:
        counts (`numpy.ndarray` of shape `(classes, named)`): see [`confusion`].
        columns: those of the class map.

    Returns:
        `dict[int, int]`: the teacher's class by the data set's class, for pairs of the best one-to-one assignment that
        are not in the map, with at least three objects, more than half the objects of the larger of both classes, and
        more than twice as many as with the map's class.
    """
    rows, best = linear_sum_assignment(counts, maximize=True)
    found: dict[int, int] = {}
    for row, name in zip(rows.tolist(), best.tolist(), strict=True):
        given = columns[row]
        by_name = 0 if given is None else counts[row, given]
        seen = counts[row, name]
        most = max(counts[row].sum(), counts[:, name].sum()) / 2  # a teacher may predict one class for everything
        if name != given and seen >= 3 and seen > most and seen > 2 * by_name:
            found[row] = name
    return found


def with_renamed(columns: Columns, found: Mapping[int, int]) -> list[int | None]:
    """The class map with the renamed classes corrected; a class whose partner is now taken has none."""
    taken = set(found.values())
    return [found.get(i, None if column in taken else column) for i, column in enumerate(columns)]
