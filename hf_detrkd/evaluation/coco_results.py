"""Evaluation of a COCO results file against COCO annotations, equal to the official evaluator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.checks import is_finite
from ..data.layouts.coco import read_categories, read_coco, require_keys
from ..data.text import read_json
from .metric import CocoBoxMetric


def evaluate_coco_files(annotations_json: str | Path, detections_json: str | Path) -> dict[str, float]:
    """The figures of a COCO results file, equal to the official evaluator's; arguments and errors of
    [`read_coco_files`], figures of [`CocoBoxMetric`]."""
    id2label, detections, references = read_coco_files(annotations_json, detections_json)
    metric = CocoBoxMetric(id2label)
    metric.add_batch(predictions=detections, references=references)
    figures = metric.compute()
    metric.close()
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
) -> tuple[dict[int, str], list[dict[str, Any]], list[dict[str, Any]]]:
    """Ground truth and results of COCO's files, image by image, as [`CocoBoxMetric`] takes them.

    Args:
        annotations_json (`str` or `Path`): a COCO object with `images`, `annotations` and `categories`. An annotation
            without `area` gets that of its box, one without `iscrowd` is no crowd.
        detections_json (`str` or `Path`): list of `{"image_id", "category_id", "bbox", "score"}`, the box as
            `[x, y, width, height]` in pixels. Images without an entry count as images without detections.

    Returns:
        `tuple[dict[int, str], list[dict], list[dict]]`: class names by category id, predictions, references.

    Raises:
        ValueError: a file is not JSON, not what it should be, or speaks of images or categories that the ground truth
            does not have; the message names the file and the first ten offenders.
    """
    truth_path, answers_path = Path(annotations_json), Path(detections_json)
    truth, answers = read_coco(truth_path), read_json(answers_path)
    if not isinstance(answers, list):
        raise ValueError(f"{answers_path} must be a list of COCO detections, got a {type(answers).__name__}.")
    require_keys(truth["images"], "images", {"id": int}, truth_path)
    id2label = dict(zip(*read_categories(truth["categories"], truth_path), strict=True))
    image_ids = {image["id"] for image in truth["images"]}
    _check_boxes(truth_path, truth["annotations"], image_ids, id2label)
    _check_boxes(answers_path, answers, image_ids, id2label)
    scoreless = (x for x in answers if not (_has(x, score=(int, float)) and is_finite(x["score"])))
    _refuse(answers_path, "detections with a finite `score`", scoreless)
    detections = [{"image_id": i, "boxes": [], "labels": [], "scores": []} for i in sorted(image_ids)]
    references = [{"image_id": i, "boxes": [], "labels": [], "area": [], "iscrowd": []} for i in sorted(image_ids)]
    _fill(detections, answers, scores=lambda x: x["score"])
    areas = {"area": lambda x: x.get("area", x["bbox"][2] * x["bbox"][3]), "iscrowd": lambda x: x.get("iscrowd", 0)}
    _fill(references, truth["annotations"], **areas)
    return id2label, detections, references


def _has(entry: Any, **types: type | tuple[type, ...]) -> bool:
    """True if a JSON object has these keys with values of these types."""
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in types.items())


def _refuse(path: Path, wanted: str, offenders: Iterable[Any]) -> None:
    first = list(islice(offenders, 10))
    if first:
        raise ValueError(f"{path} must hold {wanted}, got {str(first)[1:-1]:.1000}")


def _check_boxes(path: Path, entries: list[Any], image_ids: set[int], id2label: Mapping[int, str]) -> None:
    bad = (x for x in entries if not (_has(x, image_id=int, category_id=int, bbox=list) and _is_box(x["bbox"])))
    _refuse(path, "boxes with `image_id`, `category_id` and `bbox` as [x, y, width, height] in pixels", bad)
    _refuse(path, "image ids of the ground truth", sorted({x["image_id"] for x in entries} - image_ids))
    _refuse(path, "category ids of the ground truth", sorted({x["category_id"] for x in entries} - id2label.keys()))


def _is_box(box: list[Any]) -> bool:
    return len(box) == 4 and all(map(is_finite, box)) and min(box[2:]) >= 0


def _fill(images: list[dict[str, Any]], entries: list[dict], **columns: Callable[[dict], float]) -> None:
    """Sorts entries into their images, boxes as corners."""
    by_id = {image["image_id"]: image for image in images}
    for entry in entries:
        image, (left, top, width, height) = by_id[entry["image_id"]], entry["bbox"]
        image["boxes"].append([left, top, left + width, top + height])
        image["labels"].append(entry["category_id"])
        for name, value in columns.items():
            image[name].append(value(entry))
