"""Answers from the detections of any detector: a file of COCO results with scores."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data import DetectionDataset
from ..data.text import read_json
from ..structures.outputs import DetectorSpec
from .columns import LOWEST
from .manifest import Manifest, dataset_facts, images_facts, spec_fields


MOST = 100  # detections of an image that are kept, those of the highest scores
CERTAIN = 1e-4  # distance of a score from 0 and 1, whose logits are infinite
Found = dict[int, list[Mapping[str, Any]]]


def read_detections(file: Path, category_ids: Sequence[int]) -> Found:
    """Detections by image id, from a JSON list of `image_id`, `category_id`, `bbox` (x, y, width, height in pixels)
    and `score`.

    Raises:
        ValueError: the file holds something else, or categories that the data set has not.
    """
    content = read_json(file) if file.is_file() else None
    if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
        raise ValueError(f"--detections must be a JSON list of COCO results, but {file} is none.")
    found: Found = defaultdict(list)
    for place, one in enumerate(content):
        fault = fault_of(one)
        if fault is not None:
            raise ValueError(f"Detection {place} in {file} {fault}.")
        if one["category_id"] not in category_ids:
            raise ValueError(
                f"Detection {place} in {file} has the category {one['category_id']}, but those of the data set are "
                f"{sorted(category_ids)[:10]}."
            )
        found[one["image_id"]].append(one)
    return dict(found)


def fault_of(one: Mapping[str, Any]) -> str | None:
    """What is wrong with a detection, or `None`."""
    missing = [name for name in ("image_id", "category_id", "bbox", "score") if name not in one]
    if missing:
        return f"has no {missing[0]}"
    if not isinstance(one["image_id"], int):
        return f"has the image_id {one['image_id']!r}, which must be a whole number"
    score, box = one["score"], one["bbox"]
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        return f"has the score {score!r}, which must be a number in [0, 1]"
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(v, int | float) for v in box)
        or min(box[2:]) < 0
    ):
        return f"has the bbox {box!r}, which must be x, y, width and height in pixels"
    return None


def detections_manifest(file: Path, dataset: DetectionDataset, names: Mapping[str, Any], shard: int) -> Manifest:
    """Description of the answers: a teacher without a model, that has predicted boxes and scores.

    Args:
        file (`Path`): of the detections.
        dataset ([`DetectionDataset`]): the images as they are, in one view.
        names (`dict[str, Any]`): `name` and `split` of the data set, and the `teacher_image_size` of the run.
        shard (`int`): rows per file.
    """
    classes = len(dataset.classes)
    spec = DetectorSpec("detections", frozenset({"boxes"}), 0, 1, MOST, classes, "sigmoid")
    shapes = {"layers/0/logits": [MOST, classes], "layers/0/boxes": [MOST, 4], "queries/boxes": [MOST, 4]}
    teacher = {"name": file.name, "source": "detections", "revision": None, "parameters": None, "dtype": "float32"}
    return Manifest(
        teacher=teacher | {"weights": hashlib.sha256(file.read_bytes()).hexdigest(), "classes": list(dataset.classes)},
        spec=spec_fields(spec),
        images=images_facts(dataset, names, "moved"),
        dataset=dataset_facts(dataset, names),
        questions={},
        seed=0,
        grids=[],
        columns={name: {"dtype": "float32", "shape": shape} for name, shape in shapes.items()},
        stored="float32",
        shard=shard,
        rows=len(dataset),
    )


def detection_rows(found: Found, dataset: DetectionDataset, places: range) -> Iterator[dict[str, Any]]:
    """One row for each image at the given places: its best detections as queries, and queries without a score."""
    for place in places:
        record = dataset.records[place]
        width, height = record.width, record.height
        if width is None or height is None:
            width, height = record.load().size
        best = sorted(found.get(record.image_id, []), key=lambda one: -one["score"])[:MOST]
        logits = np.full((MOST, len(dataset.classes)), LOWEST, dtype=np.float32)
        boxes = np.tile(np.array([0.5, 0.5, 1.0, 1.0], dtype=np.float32), (MOST, 1))
        for row, one in enumerate(best):
            score = min(max(one["score"], CERTAIN), 1 - CERTAIN)
            logits[row, dataset.category_ids.index(one["category_id"])] = np.log(score / (1 - score))
            x, y, w, h = one["bbox"]
            boxes[row] = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
        yield {
            "image_id": record.image_id,
            "view": 0,
            "fingerprint": record.fingerprint,
            "layers/0/logits": logits,
            "layers/0/boxes": boxes,
            "queries/boxes": boxes,
        }
