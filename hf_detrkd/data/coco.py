"""A folder in COCO layout: `annotations/instances_<split>.json` beside one folder of images per split, `<split>/`."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from .checks import Problems, RawAnnotations, check_annotations, repeated
from .detection import DetectionDataset
from .errors import DatasetError
from .images import read_image, read_size
from .records import TableRecords


def coco_splits(folder: Path) -> list[str]:
    """Names of the splits that have annotations in a folder, none if it is no COCO folder."""
    prefix = "instances_"
    return sorted(path.stem.removeprefix(prefix) for path in folder.glob(f"annotations/{prefix}*.json"))


def load_coco(folder: Path, split: str) -> DetectionDataset:
    """One split of a COCO folder, checked.

    Category ids become indices in the order of the ids; [`DetectionDataset`] keeps the ids. Images without annotations
    stay. An image without `width` and `height` takes them from the header of its file.

    Raises:
        `DatasetError`: if the JSON is not COCO, or for everything that cannot be repaired, at once.
    """
    path = folder / "annotations" / f"instances_{split}.json"
    content = read_coco(path)
    problems = Problems(str(path))
    category_ids, classes = read_categories(content["categories"], path)
    images = _images(content["images"], path)
    files = _files([image["file_name"] for image in images], folder / split, problems)
    image_ids = [image["id"] for image in images]
    problems.add(repeated(image_ids), lambda i: f"the image id {image_ids[i]} is used more than once")
    sizes = np.array([_size(image, file) for image, file in zip(images, files, strict=True)], dtype=np.int64)
    raw = _annotations(content["annotations"], image_ids, path, problems)
    class_of = {category_id: index for index, category_id in enumerate(category_ids)}
    table = check_annotations(raw, sizes, class_of, problems)
    records = TableRecords(np.array(image_ids, dtype=np.int64), files.__getitem__, sizes, partial(_read, files), table)
    return DetectionDataset(records, classes, category_ids, table.repaired)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        `DatasetError`: the file is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not JSON ({error}).") from error


def read_coco(path: Path) -> dict[str, list[Any]]:
    """The lists `images`, `annotations` and `categories` of a COCO file; their entries are not checked yet.

    Raises:
        `DatasetError`: the file is not JSON, or holds something else.
    """
    content = read_json(path)
    wanted = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in wanted):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise DatasetError(f"{path} is not COCO: it must have the lists {', '.join(wanted)}, got {found}.")
    if not content["images"]:
        raise DatasetError(f"{path} lists no images.")
    return content


def require_keys(entries: list[Any], kind: str, types: dict[str, type], path: Path) -> None:
    """Raises if an entry is no object with these keys and types; `bool` is no `int`."""
    problems = Problems(f"{path} is not COCO: `{kind}`")
    for key, wanted in types.items():
        good = [isinstance(entry, dict) and type(entry.get(key)) is wanted for entry in entries]
        bad = [i for i, is_good in enumerate(good) if not is_good]
        problems.add(bad, partial("entry {2} has no `{0}` of type {1}".format, key, wanted.__name__))
    problems.raise_if_any()


def read_categories(entries: list[Any], path: Path) -> tuple[list[int], list[str]]:
    """Ids in ascending order and their names."""
    require_keys(entries, "categories", {"id": int, "name": str}, path)
    pairs = sorted((entry["id"], entry["name"]) for entry in entries)
    ids, names = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    problems = Problems(f"{path}: `categories`")
    problems.add(repeated(ids), lambda i: f"the id {ids[i]} is used more than once")
    problems.add(repeated(names), lambda i: f"the name {names[i]!r} is used more than once")
    problems.raise_if_any()
    if not pairs:
        raise DatasetError(f"{path} lists no categories.")
    return ids, names


def _images(entries: list[Any], path: Path) -> list[dict[str, Any]]:
    require_keys(entries, "images", {"id": int, "file_name": str}, path)
    problems = Problems(f"{path} is not COCO: `images`")
    bad = [i for i, entry in enumerate(entries) if not _is_size(entry.get("width"), entry.get("height"))]
    problems.add(bad, lambda i: f"{entries[i]['file_name']} has no positive whole `width` and `height`")
    problems.raise_if_any()
    return entries


def _is_size(width: Any, height: Any) -> bool:
    if width is None and height is None:
        return True
    return type(width) is int and type(height) is int and width > 0 and height > 0


def _files(names: list[str], folder: Path, problems: Problems) -> list[str]:
    """Paths of the images. A name that leaves the folder (its path is left empty) and a missing file are problems."""
    files = ["" if _leaves(name) else str(folder / name) for name in names]
    outside = [i for i, file in enumerate(files) if not file]
    problems.add(outside, lambda i: f"the file_name {names[i]!r} leaves the folder {folder}")
    missing = [i for i, file in enumerate(files) if file and not os.path.isfile(file)]
    problems.add(missing, lambda i: f"the image file {files[i]} does not exist")
    return files


def _leaves(name: str) -> bool:
    """True if a path is absolute or climbs out of its folder, by the rules of any system."""
    return ".." in re.split(r"[\\/]", name) or name.startswith(("/", "\\")) or bool(PureWindowsPath(name).drive)


def _size(image: dict[str, Any], file: str) -> tuple[int, int]:
    return (image["width"], image["height"]) if image.get("width") else read_size(file)


def _annotations(entries: list[Any], image_ids: list[int], path: Path, problems: Problems) -> RawAnnotations:
    """The columns of all annotations of known images; one of an unknown image is a problem."""
    require_keys(entries, "annotations", {"image_id": int}, path)
    needed = ("bbox", "category_id")
    bad = [i for i, entry in enumerate(entries) if not all(key in entry for key in needed)]
    structure = Problems(f"{path} is not COCO: `annotations`")
    structure.add(bad, lambda i: f"entry {i} has no `bbox` or no `category_id`")
    structure.raise_if_any()
    position = {image_id: i for i, image_id in enumerate(image_ids)}
    lost = [i for i, entry in enumerate(entries) if entry["image_id"] not in position]
    problems.add(lost, lambda i: f"{_name(entries[i], i)} is of the unlisted image {entries[i]['image_id']}")
    known = [i for i, entry in enumerate(entries) if entry["image_id"] in position]
    kept = [entries[i] for i in known]
    return RawAnnotations(
        image_index=[position[entry["image_id"]] for entry in kept],
        boxes=[entry["bbox"] for entry in kept],
        categories=[entry["category_id"] for entry in kept],
        areas=[entry.get("area") for entry in kept],
        crowds=[entry.get("iscrowd") for entry in kept],
        describe=lambda i: _name(kept[i], known[i]),
    )


def _name(entry: dict[str, Any], position: int) -> str:
    return f"annotation {entry['id']}" if "id" in entry else f"annotation entry {position}"


def _read(files: list[str], index: int) -> Image.Image:
    return read_image(files[index], files[index])
