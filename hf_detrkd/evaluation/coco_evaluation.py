"""Runs the COCO library on arrays of boxes, one class after the other.

The library takes a dict per box. Classes do not depend on each other, so only those of one class exist at a time, and
classes without ground truth, whose figures are -1, are skipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from ..data.garbage import without_garbage_collection
from .box_rows import TRUTH
from .figures import CURVE_THRESHOLDS, FIGURES, Curves, class_figures


def evaluate_boxes(
    truth: np.ndarray, found: np.ndarray, id2label: Mapping[int, str]
) -> tuple[dict[str, float], Curves]:
    """The figures and the curves of [`CocoBoxMetric`].

    Args:
        truth (`numpy.ndarray`): ground truth, rows of `TRUTH`; images are numbered in the order in which equal scores
            are ranked.
        found (`numpy.ndarray`): detections, rows of `FOUND`.
        id2label (`dict[int, str]`): class names; rows have no other label.
    """
    numbers = sorted(id2label)
    whole = COCOeval_faster(iouType="bbox")
    grid = whole.params
    cells = (len(numbers), len(grid.areaRng), len(grid.maxDets))
    precision = np.full((len(grid.iouThrs), len(grid.recThrs), *cells), -1.0)
    recall = np.full((len(grid.iouThrs), *cells), -1.0)
    for place, (real, answers) in enumerate(zip(_by_label(truth, numbers), _by_label(found, numbers), strict=True)):
        if len(real):
            images = np.union1d(real["image"], answers["image"]).tolist()
            with without_garbage_collection():
                one = COCOeval_faster(*(_ClassBoxes(images, numbers[place], rows) for rows in (real, answers)), "bbox")
                one.evaluate()
                one.accumulate()
            precision[:, :, [place]], recall[:, [place]] = one.eval["precision"], one.eval["recall"]
    whole.eval = {"precision": precision, "recall": recall}
    whole.summarize()
    figures = dict(zip(FIGURES, (float(value) for value in whole.stats), strict=True))
    return _with_classes(figures, precision[..., 0, -1], id2label)  # all areas, 100 detections


def _with_classes(
    figures: dict[str, float], precision: np.ndarray, id2label: Mapping[int, str]
) -> tuple[dict[str, float], Curves]:
    """Adds the figures of the classes, with precision `(thresholds, recalls, classes)`; also returns the curves."""
    curves: Curves = {percent: {} for percent in CURVE_THRESHOLDS}
    shared = Counter(id2label.values())
    for i, (number, key) in enumerate(class_figures(id2label).items()):
        name = id2label[number] if shared[id2label[number]] == 1 else f"{id2label[number]}_{number}"
        known = precision[..., i][precision[..., i] > -1]
        figures[key] = float(known.mean()) if known.size else -1.0
        for percent, threshold in CURVE_THRESHOLDS.items():
            if known.size:
                curves[percent][name] = precision[threshold, :, i].tolist()
    return figures, curves


def _by_label(rows: np.ndarray, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """The rows of each of the labels, in their order."""
    order = np.argsort(rows["label"], kind="stable")
    starts, ends = (np.searchsorted(rows["label"], numbers, side, sorter=order) for side in ("left", "right"))
    return (rows[order[start:end]] for start, end in zip(starts, ends, strict=True))


class _ClassBoxes:
    """The boxes of one class, with those methods of pycocotools' `COCO` that an evaluation calls: an index of the
    annotations would take as long as a third of the evaluation."""

    def __init__(self, image_ids: list[int], category_id: int, rows: np.ndarray):
        self.image_ids, self.category_id = image_ids, category_id
        self.annotations = _annotations(rows)

    def getImgIds(self) -> list[int]:
        return self.image_ids

    def getCatIds(self) -> list[int]:
        return [self.category_id]

    def getAnnIds(self, imgIds: Any, catIds: Any) -> range:
        return range(1, len(self.annotations) + 1)

    def loadAnns(self, ids: range) -> list[dict[str, Any]]:
        return self.annotations


def _annotations(rows: np.ndarray) -> list[dict[str, Any]]:
    """COCO's annotations; the image's number instead of its id, since the library keeps ids in doubles."""
    is_truth = rows.dtype == TRUTH
    area = rows["area"] if is_truth else rows["box"][:, 2] * rows["box"][:, 3]
    last = "iscrowd" if is_truth else "score"
    columns = zip(*(c.tolist() for c in (rows["image"], rows["label"], rows["box"], area, rows[last])), strict=True)
    return [
        {"id": number, "image_id": image, "category_id": label, "bbox": box, "area": size, last: value}
        for number, (image, label, box, size, value) in enumerate(columns, start=1)  # 0 means "unmatched"
    ]
