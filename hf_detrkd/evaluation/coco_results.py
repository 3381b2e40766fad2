"""Evaluation of a COCO results file against COCO annotations, equal to the official evaluator."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..data.checks import is_finite
from ..data.layouts.coco import read_categories, read_coco, require_keys
from ..data.text import read_json
from .box_rows import FOUND, TRUTH
from .coco_evaluation import evaluate_boxes


NUMBERS = frozenset({int, float})
MOST = sys.float_info.max


def evaluate_coco_files(annotations_json: str | Path, detections_json: str | Path) -> dict[str, float]:
    """The figures of a COCO results file, equal to the official evaluator's; arguments and errors of
    [`read_coco_files`], figures of [`CocoBoxMetric`]."""
    id2label, found, truth = read_coco_files(annotations_json, detections_json)
    figures, _ = evaluate_boxes(truth, found, id2label)
    return figures


def coco_results(images: Sequence[Mapping[str, Any]], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Detections as COCO's results: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels) and `score`.

    Args:
        images: one dict per image, `image_id`, `boxes` (corners in pixels), `labels` and `scores`.
        category_ids (`Sequence[int]`): the data set's id of each class.
    """
    return [
        {
            "image_id": int(image["image_id"]),
            "category_id": category_ids[int(label)],
            "bbox": [round(float(v), 3) for v in (left, top, right - left, bottom - top)],
            "score": round(float(score), 6),
        }
        for image in images
        for label, score, (left, top, right, bottom) in zip(
            image["labels"], image["scores"], image["boxes"], strict=True
        )
    ]


def read_coco_files(
    annotations_json: str | Path, detections_json: str | Path
) -> tuple[dict[int, str], np.ndarray, np.ndarray]:
    """Ground truth and results of COCO's files.

    Args:
        annotations_json (`str` or `Path`): a COCO object with `images`, `annotations` and `categories`. An annotation
            without `area` gets that of its box, one without `iscrowd` is no crowd.
        detections_json (`str` or `Path`): list of `{"image_id", "category_id", "bbox", "score"}`, the box as
            `[x, y, width, height]` in pixels. Images without an entry count as images without detections. Or a file of
            `hf-detrkd predict`, whose images are those with the same `file_name`, and whose categories have the same
            name.

    Returns:
        `tuple[dict[int, str], numpy.ndarray, numpy.ndarray]`: class names by category id, detections (rows of
        `FOUND`) and ground truth (rows of `TRUTH`). Images are numbered in the order of their ids, labels are category
        ids.

    Raises:
        ValueError: a file is not JSON, not what it should be, or speaks of images or categories that the ground truth
            does not have; the message names the file and the first ten offenders.
    """
    truth_path, answers_path = Path(annotations_json), Path(detections_json)
    truth, answers = read_coco(truth_path), read_json(answers_path)
    require_keys(truth["images"], "images", {"id": int}, truth_path)
    if isinstance(answers, dict) and "annotations" in answers:
        answers = _as_results(answers_path, read_coco(answers_path), truth_path, truth)
    if not isinstance(answers, list):
        raise ValueError(f"{answers_path} must be a list of COCO detections, got a {type(answers).__name__}.")
    id2label = dict(zip(*read_categories(truth["categories"], truth_path), strict=True))
    _refuse(truth_path, "category ids of 64 bits", (one for one in id2label if not -(2**63) <= one < 2**63))
    numbers = {one: number for number, one in enumerate(sorted({image["id"] for image in truth["images"]}))}
    references = _rows(truth_path, truth["annotations"], numbers, id2label, TRUTH)
    area, crowd = _truth_columns(truth_path, truth["annotations"])
    references["area"] = np.where(np.isnan(area), references["box"][:, 2] * references["box"][:, 3], area)
    references["iscrowd"] = crowd
    detections = _rows(answers_path, answers, numbers, id2label, FOUND)
    scoreless = (x for x in answers if not is_finite(x.get("score")))
    _refuse(answers_path, "detections with a finite `score`", scoreless)
    detections["score"] = [x["score"] for x in answers]
    return id2label, detections, references


def _as_results(
    path: Path, found: Mapping[str, list[Any]], truth_path: Path, truth: Mapping[str, list[Any]]
) -> list[dict[str, Any]]:
    """The annotations of a COCO object with the ids of another one, which has its file names and category names."""
    pairs = ((truth_path, truth["images"]), (path, found["images"]))
    for place, images in pairs:
        require_keys(images, "images", {"id": int, "file_name": str}, place)
    wanted, given = ({image["file_name"]: image["id"] for image in images} for _, images in pairs)
    _refuse(path, "file names of the ground truth", (name for name in given if name not in wanted))
    ids, names = read_categories(truth["categories"], truth_path)
    own_ids, own_names = read_categories(found["categories"], path)
    categories = dict(zip(names, ids, strict=True))
    require_keys(found["annotations"], "annotations", {"image_id": int, "category_id": int}, path)
    used = {one["category_id"] for one in found["annotations"]}
    labels = {one: name for one, name in zip(own_ids, own_names, strict=True) if one in used}
    _refuse(path, "category names of the ground truth", (n for n in labels.values() if n not in categories))
    images_of = {number: wanted[name] for name, number in given.items()}
    _refuse(path, "annotations of its own images", (x for x in found["annotations"] if x["image_id"] not in images_of))
    _refuse(path, "annotations of its own categories", used - labels.keys())
    return [
        {**one, "image_id": images_of[one["image_id"]], "category_id": categories[labels[one["category_id"]]]}
        for one in found["annotations"]
    ]


def _rows(
    path: Path, entries: list[Any], numbers: Mapping[int, int], id2label: Mapping[int, str], kind: np.dtype
) -> np.ndarray:
    """Images, labels and boxes of all entries, which are checked first; the other columns are not set yet."""
    bad = (x for x in entries if not (_has_ids(x) and _is_box(x.get("bbox"))))
    _refuse(path, "boxes with `image_id`, `category_id` and `bbox` as [x, y, width, height] in pixels", bad)
    images, labels = [x["image_id"] for x in entries], [x["category_id"] for x in entries]
    _refuse(path, "image ids of the ground truth", sorted(set(images) - numbers.keys()))
    _refuse(path, "category ids of the ground truth", sorted(set(labels) - id2label.keys()))
    rows = np.empty(len(entries), dtype=kind)
    rows["image"], rows["label"] = [numbers[one] for one in images], labels
    rows["box"] = np.array([x["bbox"] for x in entries], dtype=np.float64).reshape(-1, 4)
    return rows


def _truth_columns(path: Path, entries: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Areas, NaN where there are none, and crowds of annotations."""
    areas, crowds = [x.get("area") for x in entries], [x.get("iscrowd") for x in entries]
    bad = (entries[i] for i, area in enumerate(areas) if area is not None and not is_finite(area))
    _refuse(path, "annotations with a finite `area` or none", bad)
    neither = (entries[i] for i, crowd in enumerate(crowds) if crowd not in (None, 0, 1))
    _refuse(path, "annotations with an `iscrowd` of 0 or 1", neither)
    return np.array(areas, dtype=np.float64), np.array([crowd or 0 for crowd in crowds], dtype=np.int64)


def _has_ids(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("image_id")) is int and type(entry.get("category_id")) is int


def _is_box(box: Any) -> bool:
    """True for four numbers that a double holds, the last two not negative."""
    if type(box) is not list or len(box) != 4 or not NUMBERS.issuperset(map(type, box)):
        return False
    left, top, width, height = box
    return abs(left) <= MOST and abs(top) <= MOST and 0 <= width <= MOST and 0 <= height <= MOST


def _refuse(path: Path, wanted: str, offenders: Iterable[Any]) -> None:
    first = list(islice(offenders, 10))
    if first:
        raise ValueError(f"{path} must hold {wanted}, got {str(first)[1:-1]:.1000}")
