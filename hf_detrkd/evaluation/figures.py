"""Names of the COCO metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


PRECISIONS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
RECALLS = ("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")
FIGURES = PRECISIONS + RECALLS  # in the official evaluator's order
CURVE_THRESHOLDS = {"50": 0, "75": 5}  # IoU in percent to its index among the evaluator's ten thresholds

Curves = dict[str, dict[str, list[float]]]  # precision over recall, by IoU in percent and class


def class_figures(id2label: Mapping[int, str]) -> dict[int, str]:
    """Name of each class's metric, by class number: see [`CocoBoxMetric`]."""
    taken = Counter(FIGURES) + Counter(f"map_{name}" for name in id2label.values())
    return {
        number: f"map_{name}" if taken[f"map_{name}"] == 1 else f"map_{name}_{number}"
        for number, name in sorted(id2label.items())
    }
