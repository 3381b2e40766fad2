"""Which student query answers for which teacher query, from costs on the host."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment


def positives(index: np.ndarray, num_queries: int) -> np.ndarray:
    """Whether each teacher query was given a box: bool of shape `(num_layers, batch_size, num_queries)`."""
    chosen = np.zeros((*index.shape[:2], num_queries + 1), dtype=bool)
    np.put_along_axis(chosen, np.where(index < 0, num_queries, index), True, axis=-1)
    return chosen[..., :num_queries]


def pair_positives_first(cost: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """The student query of each teacher query: positives are assigned first, the rest among what is left.

    Args:
        cost (`np.ndarray` of shape `(num_layers, batch_size, student_queries, teacher_queries)`)
        positive (`np.ndarray` of shape `(num_layers, batch_size, teacher_queries)`)

    Returns:
        `np.ndarray` of shape `(num_layers, batch_size, teacher_queries)`, -1 where the student has too few queries.
    """
    pairing = np.full(positive.shape, -1, dtype=np.int64)
    for layer, image in np.ndindex(*cost.shape[:2]):
        free = np.ones(cost.shape[2], dtype=bool)
        for columns in (positive[layer, image].nonzero()[0], (~positive[layer, image]).nonzero()[0]):
            candidates = free.nonzero()[0]
            rows, taken = linear_sum_assignment(cost[layer, image][np.ix_(candidates, columns)])
            pairing[layer, image, columns[taken]] = candidates[rows]
            free[candidates[rows]] = False
    return pairing
