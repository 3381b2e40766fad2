"""Reads rows of the `datasets` library in its usual detection schema.

`image` (an `Image` feature) and `objects` with `bbox` (COCO x, y, width, height in pixels), `category` (a
`ClassLabel`), and optionally `area` and `iscrowd`; and optionally `image_id`, `width` and `height`. `objects`
may be a dict of lists or a list of dicts.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from .checks import Problems, RawAnnotations, check_annotations, repeated
from .detection import DetectionDataset
from .errors import DatasetError
from .images import read_image, read_size
from .records import TableRecords


_SCHEMA = "`image` and `objects` with `bbox` and `category`"


def load_rows(rows: datasets.Dataset, source: str) -> DetectionDataset:
    """Loads and checks a `datasets.Dataset` without decoding images.

    Class names and their order are those of the `ClassLabel`. `image_id` is the column of that name if it is an
    integer column, else the position of the row.

    Args:
        rows (`datasets.Dataset`)
        source (`str`): its name in error messages.

    Raises:
        `DatasetError`: if the columns do not match the schema, or for all problems that cannot be repaired, at once.
    """
    classes = _class_names(rows, source)
    return _loaded(rows, source, classes)


def load_row_images(rows: datasets.Dataset, source: str) -> DetectionDataset:
    """The images of rows without their annotations, which need not be there.

    Raises:
        `DatasetError`: there is no column `image`, or some images are missing.
    """
    if not isinstance(rows.features.get("image"), datasets.Image):
        raise DatasetError(
            f"{source} must have a column `image` of the type `Image`, but has {sorted(rows.features)}."
        )
    return _loaded(rows, source, None)


def _loaded(rows: datasets.Dataset, source: str, classes: list[str] | None) -> DetectionDataset:
    """The images, and their annotations unless `classes` is `None`."""
    rows = rows.with_format(None).cast_column("image", datasets.Image(decode=False))
    problems = Problems(source)
    sizes = _sizes(rows, problems)
    image_ids = _image_ids(rows, problems)
    problems.add(repeated(image_ids), lambda i: f"row {i} repeats the image id {image_ids[i]}")
    raw = RawAnnotations([], [], [], [], [], str) if classes is None else _annotations(rows, problems)
    table = check_annotations(raw, sizes, {i: i for i in range(len(classes or []))}, problems)
    read = partial(_read, rows.select_columns("image"), source)
    records = TableRecords(np.array(image_ids, dtype=np.int64), partial(_name, source), sizes, read, table)
    return DetectionDataset(records, classes or [], repaired=table.repaired)


def _class_names(rows: datasets.Dataset, source: str) -> list[str]:
    """The class names; also checks the columns of the schema."""
    features = rows.features
    objects = _element(features.get("objects"))
    if not isinstance(objects, dict) or not {"bbox", "category"} <= set(objects) or "image" not in features:
        inside = f", `objects` has {sorted(objects)}" if isinstance(objects, dict) else ""
        raise DatasetError(f"{source} must have the columns {_SCHEMA}, but has {sorted(features)}{inside}.")
    if not isinstance(features["image"], datasets.Image):
        raise DatasetError(
            f"The column `image` of {source} must be an `Image` feature, but is {features['image']}: use "
            "`cast_column('image', datasets.Image())`."
        )
    category = _element(objects["category"])
    if not isinstance(category, datasets.ClassLabel):
        raise DatasetError(
            f"The field `category` of {source} must be a `ClassLabel`, which names the classes, but is {category}: "
            "cast it to a `ClassLabel` with the class names."
        )
    return list(category.names)


def _element(feature: Any) -> Any:
    """The element type of a list feature, or the feature itself."""
    return feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature


def _sizes(rows: datasets.Dataset, problems: Problems) -> np.ndarray:
    """(width, height) of all images from the columns or else the file headers; missing files are problems."""
    columns = [rows.features.get(name) for name in ("width", "height")]
    known = all(_is_integer(column) for column in columns)
    sizes: list[tuple[int, int]] = []
    missing: dict[int, str | None] = {}
    start = 0
    for batch in rows.select_columns("image").with_format("arrow").iter(batch_size=256):
        for chunk in batch["image"].chunks:
            paths, empty = chunk.field("path").to_pylist(), chunk.field("bytes").is_null().to_pylist()
            for i, (path, no_bytes) in enumerate(zip(paths, empty, strict=True)):
                if no_bytes and (path is None or not Path(path).is_file()):
                    missing[start + i] = path
                if not known:
                    sizes.append(read_size((path or "") if no_bytes else chunk.field("bytes")[i].as_py()))
            start += len(paths)
    problems.add(missing, lambda i: f"the image file {missing[i]} of row {i} does not exist")
    if known:
        shapes = rows.select_columns(["width", "height"])[:]
        sizes = [(w or 0, h or 0) for w, h in zip(shapes["width"], shapes["height"], strict=True)]
    return np.array(sizes, dtype=np.int64).reshape(-1, 2)


def _image_ids(rows: datasets.Dataset, problems: Problems) -> list[int]:
    if not _is_integer(rows.features.get("image_id")):
        return list(range(len(rows)))
    image_ids = list(rows["image_id"])
    problems.add([i for i, value in enumerate(image_ids) if value is None], lambda i: f"row {i} has no image id")
    return image_ids


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and "int" in feature.dtype


def _annotations(rows: datasets.Dataset, problems: Problems) -> RawAnnotations:
    """The columns of all annotations, from either layout."""
    raw = RawAnnotations([], [], [], [], [], describe=lambda i: f"row {raw.image_index[i]}")
    uneven = []
    for position, objects in enumerate(rows.select_columns("objects")[:]["objects"]):
        if isinstance(objects, list):
            keys = ("bbox", "category", "area", "iscrowd")
            objects = {key: [entry.get(key) for entry in objects] for key in keys}
        objects = objects or {"bbox": [], "category": []}
        boxes, categories = objects["bbox"] or [], objects["category"] or []
        areas, crowds = (objects.get(key) or [None] * len(boxes) for key in ("area", "iscrowd"))
        if not len(boxes) == len(categories) == len(areas) == len(crowds):
            uneven.append(position)
            continue
        raw.image_index.extend([position] * len(boxes))
        raw.boxes.extend(boxes)
        raw.categories.extend(categories)
        raw.areas.extend(areas)
        raw.crowds.extend(crowds)
    problems.add(uneven, lambda i: f"the lists in `objects` of row {i} differ in length")
    return raw


def _name(source: str, index: int) -> str:
    return f"{source}, row {index}"


def _read(rows: datasets.Dataset, source: str, index: int) -> Image.Image:
    image = rows[index]["image"]
    if image["bytes"] is None:
        return read_image(image["path"], image["path"])
    return read_image(image["bytes"], f"{_name(source, index)} ({image['path'] or 'without a file name'})")
