"""Folders with COCO JSON files: COCO's own layout, Roboflow's, and those of CVAT and Label Studio.

The JSON files are `annotations/instances_<split>.json`, other files of `annotations/`,
`<split>/_annotations.coco.json` beside the images, or lie in the folder itself. The images of a split lie in
`<split>/`, `images/<split>/`, beside the JSON, in `images/`, or where the `file_name`s lead from the folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from ..checks import Problems, RawAnnotations, repeated, warn_of
from ..detection import DetectionDataset
from ..errors import DatasetError
from ..garbage import without_garbage_collection
from ..images import read_size
from ..records import RepairedBoxes
from ..text import read_json
from .coco_index import Indexed, index_of
from .source import Source, dataset_of_files, dataset_of_table, subfolders


BESIDE = "_annotations.coco.json"  # Roboflow's name
LISTS = ("images", "annotations", "categories")


def find_coco(folder: Path, seed: int) -> Source | None:
    """The splits of a folder with JSON files in `annotations/` or beside the images; `None` for another layout."""
    inside = sorted((folder / "annotations").glob("*.json"))
    files = [file for file in inside if file.name.startswith("instances_")] or inside
    if (folder / "annotations").is_dir() and not files and not any((folder / "annotations").glob("*.xml")):
        raise DatasetError(
            f"The folder {folder / 'annotations'} must contain instances_<split>.json files, but has none."
        )
    if not files:
        files = [part / BESIDE for part in subfolders(folder) if (part / BESIDE).is_file()]
    return coco_source(folder, {split_of(file): file for file in files}) if files else None


def find_single_coco(folder: Path, seed: int) -> Source | None:
    """The splits of a folder that holds COCO JSON files itself, such as Label Studio's `result.json`."""
    files = [file for file in sorted(folder.glob("*.json")) if _is_coco(file)]
    return coco_source(folder, {split_of(file): file for file in files}) if files else None


def coco_source(folder: Path, files: Mapping[str, Path]) -> Source:
    """The splits of JSON files, by name, with images in a folder."""

    def load(split: str, most: int | None) -> DetectionDataset:
        dataset = load_coco(folder, split, files[split])
        return dataset if most is None else dataset.select(range(min(most, len(dataset))))

    return Source(str(folder), list(files), load)


def split_of(file: Path) -> str:
    """The split of a JSON file by its name, or by its folder's for Roboflow's name."""
    return file.parent.name if file.name == BESIDE else file.stem.removeprefix("instances_")


def _is_coco(file: Path) -> bool:
    """True if a JSON file has COCO's lists."""
    index = index_of(file)
    if index is not None and index.read() is not None:
        return True
    try:
        content = read_json(file)
    except DatasetError:
        return False
    return isinstance(content, dict) and all(isinstance(content.get(name), list) for name in LISTS)


def load_coco(folder: Path, split: str, path: Path | None = None) -> DetectionDataset:
    """One split of a COCO folder, checked.

    Category ids become indices in the order of the ids; [`DetectionDataset`] keeps the ids. Images without annotations
    stay. An image without `width` and `height` takes them from the header of its file. A large file is read once, see
    [`~hf_detrkd.data.layouts.coco_index.CocoIndex`].

    Args:
        folder (`Path`)
        split (`str`)
        path (`Path`, *optional*): the JSON file. Default: `annotations/instances_<split>.json` in the folder.

    Raises:
        `DatasetError`: if the JSON is not COCO, or for everything that cannot be repaired, at once.
    """
    path = path or folder / "annotations" / f"instances_{split}.json"
    index = index_of(path)
    known = None if index is None else index.read()
    if known is not None:
        return _of_index(known, folder, split, path)
    dataset, names, measured = _of_json(folder, split, path)
    if index is not None and not measured:  # an image may change without its index
        index.write(Indexed.of(dataset, names))
    return dataset


@without_garbage_collection()
def _of_json(folder: Path, split: str, path: Path) -> tuple[DetectionDataset, list[str], bool]:
    """The data set of a JSON file, the images' `file_name`s, and whether sizes of images were read from them."""
    content = read_coco(path)
    problems = Problems(str(path))
    category_ids, classes = read_categories(content["categories"], path)
    images = _images(content["images"], path)
    names = [image["file_name"] for image in images]
    files = _files(names, image_folder(names, folder, split, path), problems)
    image_ids = [image["id"] for image in images]
    problems.add(repeated(image_ids), lambda i: f"the image id {image_ids[i]} is used more than once")
    problems.add(_too_large(image_ids), lambda i: f"the image id {image_ids[i]} does not fit 64 bits")
    sizes = np.array([_size(image, file) for image, file in zip(images, files, strict=True)], dtype=np.int64)
    raw = _annotations(content["annotations"], image_ids, path, problems)
    dataset = dataset_of_files(files, image_ids, sizes, raw, classes, problems, category_ids)
    return dataset, names, not all(image.get("width") for image in content["images"])


def _of_index(known: Indexed, folder: Path, split: str, path: Path) -> DetectionDataset:
    """The data set of an index: with the warnings of its JSON file, and the image files that are missing now."""
    problems = Problems(str(path))
    files = _files(known.names, image_folder(known.names, folder, split, path), problems)
    repaired = RepairedBoxes(str(path), **known.repaired)
    warn_of(repaired)
    return dataset_of_table(
        files, known.image_ids, known.sizes, known.table(repaired), known.classes, problems, known.category_ids
    )


def image_folder(names: list[str], folder: Path, split: str, path: Path) -> Path:
    """The folder from which the file names lead to images: the first in which there is one of the first ten; by
    default `<split>/`."""
    usual = folder / split
    places = [usual, folder / "images" / split, path.parent, folder / "images", folder]
    few = [as_here(name) for name in names[:10]]
    return next((place for place in places if any(os.path.isfile(place / name) for name in few)), usual)


def as_here(name: str) -> str:
    """A file name with slashes, if it was written with the backslashes of Windows."""
    return name.replace("\\", "/")


def _too_large(ids: list[int]) -> list[int]:
    return [place for place, one in enumerate(ids) if not -(2**63) <= one < 2**63]


def read_coco(path: Path) -> dict[str, list[Any]]:
    """The lists `images`, `annotations` and `categories` of a COCO file; their entries are not checked yet.

    Raises:
        `DatasetError`: the file is not JSON, or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in LISTS):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise DatasetError(f"{path} is not COCO: it must have the lists {', '.join(LISTS)}, got {found}.")
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
    return all(type(side) is int and 0 < side < 2**31 for side in (width, height))


def _files(names: list[str], folder: Path, problems: Problems) -> list[str]:
    """Paths of the images. A name that leaves the folder (its path is left empty) and a missing file are problems."""
    files = ["" if _leaves(name) else str(_there(folder, name)) for name in names]
    outside = [i for i, file in enumerate(files) if not file]
    problems.add(outside, lambda i: f"the file_name {names[i]!r} leaves the folder {folder}")
    missing = [i for i, file in enumerate(files) if file and not os.path.isfile(file)]
    problems.add_missing(missing, lambda i: f"the image file {files[i]} does not exist")
    return files


def _there(folder: Path, name: str) -> Path:
    """The path of an image, with slashes for backslashes if only that one is there."""
    path = folder / name
    return folder / as_here(name) if "\\" in name and not os.path.isfile(path) else path


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
