"""Whether a teacher calls the classes what the class map says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from .teacher_views import Columns, Seen, overlaps


def confusion(seen: Sequence[Seen], classes: int, named: int) -> np.ndarray:
    """How often an object of each class is called each of the teacher's, `(classes, named)`: by the best detection
    that overlaps it by half."""
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
    """Classes that the teacher plainly calls otherwise than the class map says, and what it calls them.

    Args:
        counts (`numpy.ndarray` of shape `(classes, named)`): see [`confusion`].
        columns: the class map's.

    Returns:
        `dict[int, int]`: the teacher's class for some of the data set's: those that the best one-to-one assignment
        pairs otherwise, with three objects or more, most of them called so, hardly others called so, and more than
        twice as many as by the map's name.
    """
    rows, best = linear_sum_assignment(counts, maximize=True)
    found: dict[int, int] = {}
    for row, name in zip(rows.tolist(), best.tolist(), strict=True):
        given = columns[row]
        by_name = 0 if given is None else counts[row, given]
        seen = counts[row, name]
        most = max(counts[row].sum(), counts[:, name].sum()) / 2  # a teacher may call everything one name
        if name != given and seen >= 3 and seen > most and seen > 2 * by_name:
            found[row] = name
    return found


def with_renamed(columns: Columns, found: Mapping[int, int]) -> list[int | None]:
    """The class map once the renamed classes have their partners; one whose partner was taken has none."""
    taken = set(found.values())
    return [found.get(i, None if column in taken else column) for i, column in enumerate(columns)]
