"""Reads rows of the `datasets` library in its usual detection schema.

`image` (an `Image` feature) and `objects` with `bbox` (COCO x, y, width, height in pixels), `category`, and optionally
`area` and `iscrowd`; and optionally `image_id`, `width` and `height`. `objects` may be a dict of lists or a list of
dicts. Categories are a `ClassLabel`, or names, or numbers, which are then the names; imagefolders call them
`categories`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from ..checks import Problems, RawAnnotations, check_annotations, repeated
from ..detection import DetectionDataset
from ..errors import DatasetError
from ..images import read_image, read_size
from ..records import ImageRecord, RepairedBoxes, TableRecords
from .source import Source


_SCHEMA = "`image` and `objects` with `bbox` and `category`"
_CATEGORIES = ("category", "categories", "label", "labels", "category_id")
_PER_OBJECT = ("bbox", "area", "iscrowd")
_LISTS = (getattr(datasets, "List", datasets.Sequence), datasets.LargeList)  # `List` came with datasets 4


@dataclass(frozen=True)
class Classes:
    """The field of the categories, the class names, and the class of each of the field's values."""

    field: str
    names: list[str]
    index: dict[Any, int]


def find_rows(folder: Path, seed: int, labeled: bool = True) -> Source | None:
    """The splits of a folder that the `datasets` library reads, see [`rows_source`]; `None` for another layout."""
    patterns = ("*.parquet", "*.arrow", "metadata.jsonl", "metadata.csv", "metadata.parquet")
    if not is_saved(folder) and not any(next(folder.rglob(pattern), None) for pattern in patterns):
        return None
    return rows_source(load_splits(str(folder)), str(folder), labeled)


def rows_source(splits: Mapping[str, datasets.Dataset], name: str, labeled: bool = True) -> Source:
    """The splits of rows.

    Args:
        splits (`dict[str, datasets.Dataset]`)
        name (`str`): in messages.
        labeled (`bool`): the annotations are wanted; otherwise they need not be there.

    Raises:
        `DatasetError`: a split is a stream.
    """
    for split, rows in splits.items():
        if not isinstance(rows, datasets.Dataset):
            raise DatasetError(
                f"The split {split} of {name} must be a `datasets.Dataset`, got {type(rows).__name__}: streamed data "
                "sets cannot be indexed."
            )

    def load(split: str, most: int | None) -> DetectionDataset:
        rows = splits[split]
        rows = rows if most is None else rows.select(range(min(most, len(rows))))
        return (load_rows if labeled else load_row_images)(rows, f"{name}, split {split}")

    return Source(name, list(splits), load)


def load_splits(name: str, config_name: str | None = None) -> dict[str, datasets.Dataset]:
    """All splits of a folder or of a Hub id.

    Raises:
        `DatasetError`: there is none.
    """
    if is_saved(Path(name)):
        loaded = datasets.load_from_disk(name)
    else:
        with load_errors(name):
            loaded = datasets.load_dataset(name, config_name)
    return {str(loaded.split or "train"): loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)


def is_saved(folder: Path) -> bool:
    """True for a folder of `save_to_disk`."""
    return any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))


@contextmanager
def load_errors(name: str) -> Iterator[None]:
    """Says in one sentence why the `datasets` library cannot load a data set.

    Raises:
        `DatasetError`
    """
    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        raise DatasetError(
            f"No data set {name!r} was found locally or on the Hub ({error}): give `shapes`, a folder in a layout "
            "of docs/own_data.md, or a Hub id."
        ) from error
    except (ValueError, TypeError, LookupError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise DatasetError(f"The data set {name!r} cannot be loaded: {cause}") from error


def load_rows(rows: datasets.Dataset, source: str, classes: Classes | None = None) -> DetectionDataset:
    """Loads and checks a `datasets.Dataset` without decoding images.

    Class names and their order are the given ones or those of the `ClassLabel`; without one they are the categories
    that occur, sorted. `image_id` is the column of that name if it is an integer column, else the position of the row.

    Args:
        rows (`datasets.Dataset`)
        source (`str`): its name in error messages.
        classes ([`Classes`], *optional*)

    Raises:
        `DatasetError`: if the columns do not match the schema, or for all problems that cannot be repaired, at once.
    """
    return _loaded(rows, source, classes or _classes(rows, source))


def record_of(
    row: Mapping[str, Any], image: Image.Image, image_id: int, source: str, classes: Classes
) -> tuple[ImageRecord, RepairedBoxes]:
    """The checked record of one row, and the counts of its boxes.

    Args:
        row (`dict`): with `objects`, and optionally `width` and `height`.
        image (`PIL.Image.Image`): of the row, as [`read_image`] reads it.
        image_id (`int`)
        source (`str`): name of the row in error messages.
        classes ([`Classes`])

    Raises:
        `DatasetError`: the annotations cannot be repaired.
    """
    problems = Problems(source)
    raw = _annotations([_lists_of(row["objects"])], classes, problems, "the row")
    size = (row.get("width") or image.width, row.get("height") or image.height)
    sizes = np.array([size], dtype=np.int64)
    table = check_annotations(raw, sizes, {i: i for i in range(len(classes.names))}, problems, warns=False)
    records = TableRecords(np.array([image_id]), lambda _: source, sizes, lambda _: image, table)
    return records[0], table.repaired


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


def _loaded(rows: datasets.Dataset, source: str, classes: Classes | None) -> DetectionDataset:
    """The images, and their annotations unless `classes` is `None`."""
    rows = rows.with_format(None).cast_column("image", datasets.Image(decode=False))
    problems = Problems(source)
    sizes = _sizes(rows, problems)
    image_ids = _image_ids(rows, problems)
    problems.add(repeated(image_ids), lambda i: f"row {i} repeats the image id {image_ids[i]}")
    names = [] if classes is None else classes.names
    none = RawAnnotations([], [], [], [], [], str)
    raw = none if classes is None else _annotations(_objects(rows), classes, problems)
    table = check_annotations(raw, sizes, {i: i for i in range(len(names))}, problems)
    read = partial(_read, rows.select_columns("image"), source)
    records = TableRecords(np.array(image_ids, dtype=np.int64), partial(_name, source), sizes, read, table)
    return DetectionDataset(records, names, repaired=table.repaired, problems=problems)


def _classes(rows: datasets.Dataset, source: str) -> Classes:
    """The classes; also checks the columns of the schema."""
    field, category = category_of(rows.features, source)
    if isinstance(category, datasets.ClassLabel):
        return named_classes(field, category.names)
    used = sorted({value for row in _objects(rows) for value in row.get(field) or [] if value is not None})
    return Classes(field, [str(value) for value in used], {value: place for place, value in enumerate(used)})


def named_classes(field: str, names: Sequence[str]) -> Classes:
    """Classes whose values are their numbers."""
    return Classes(field, list(names), {number: number for number in range(len(names))})


def category_of(features: datasets.Features, source: str) -> tuple[str, Any]:
    """The field of the categories and its type.

    Raises:
        `DatasetError`: the columns do not match the schema.
    """
    objects = _element(features.get("objects"))
    field = next((name for name in _CATEGORIES if isinstance(objects, dict) and name in objects), None)
    if field is None or "bbox" not in objects or "image" not in features:
        inside = f", `objects` has {sorted(objects)}" if isinstance(objects, dict) else ""
        raise DatasetError(f"{source} must have the columns {_SCHEMA}, but has {sorted(features)}{inside}.")
    if not isinstance(features["image"], datasets.Image):
        raise DatasetError(
            f"The column `image` of {source} must be an `Image` feature, but is {features['image']}: use "
            "`cast_column('image', datasets.Image())`."
        )
    _check_lists(features["objects"], (field, *_PER_OBJECT), source)
    category = _element(objects[field])
    named = isinstance(category, datasets.Value) and ("int" in category.dtype or category.dtype.endswith("string"))
    if not named and not isinstance(category, datasets.ClassLabel):
        raise DatasetError(
            f"The field `{field}` of {source} must hold class names or numbers, or a `ClassLabel`, but is {category}."
        )
    return field, category


def _check_lists(objects: Any, fields: Iterable[str], source: str) -> None:
    """A struct of lists has an entry for each object in every list; a list of structs has them by its form."""
    for field in fields if isinstance(objects, dict) else ():
        feature = objects.get(field)
        if isinstance(feature, datasets.Value) and feature.dtype != "null":
            raise DatasetError(f"The field `{field}` in `objects` of {source} must be a list, but is {feature}.")


def _objects(rows: datasets.Dataset) -> Iterator[dict[str, list[Any]]]:
    """The objects of each row as a dict of lists."""
    return map(_lists_of, rows.select_columns("objects")[:]["objects"])


def _lists_of(objects: Any) -> dict[str, list[Any]]:
    """The objects of a row as a dict of lists."""
    if isinstance(objects, list):
        keys = dict.fromkeys(key for entry in objects for key in entry)
        objects = {key: [entry.get(key) for entry in objects] for key in keys}
    return objects or {}


def _element(feature: Any) -> Any:
    """The element type of a list feature, or the feature itself."""
    if isinstance(feature, list):  # a list of structs before datasets 4
        return feature[0]
    return feature.feature if isinstance(feature, _LISTS) else feature


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
    problems.add_missing(list(missing), lambda i: f"the image file {missing[i]} of row {i} does not exist")
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


def _annotations(
    rows: Iterable[dict[str, list[Any]]], classes: Classes, problems: Problems, name: str = "row {}"
) -> RawAnnotations:
    """The columns of all annotations, from the objects of each row."""
    raw = RawAnnotations([], [], [], [], [], describe=lambda i: name.format(raw.image_index[i]))
    uneven = []
    for position, objects in enumerate(rows):
        boxes, categories = objects.get("bbox") or [], objects.get(classes.field) or []
        areas, crowds = (objects.get(key) or [None] * len(boxes) for key in ("area", "iscrowd"))
        if not len(boxes) == len(categories) == len(areas) == len(crowds):
            uneven.append(position)
            continue
        raw.image_index.extend([position] * len(boxes))
        raw.boxes.extend(boxes)
        raw.categories.extend(classes.index.get(value, value) for value in categories)
        raw.areas.extend(areas)
        raw.crowds.extend(crowds)
    problems.add(uneven, lambda i: f"the lists in `objects` of {name.format(i)} differ in length")
    return raw


def _name(source: str, index: int) -> str:
    return f"{source}, row {index}"


def _read(rows: datasets.Dataset, source: str, index: int) -> Image.Image:
    image = rows[index]["image"]
    if image["bytes"] is None:
        return read_image(image["path"], image["path"])
    return read_image(image["bytes"], f"{_name(source, index)} ({image['path'] or 'without a file name'})")
