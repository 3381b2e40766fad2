"""A folder in YOLO's layout: images, and for each a text file of lines `class center_x center_y width height`.

`data.yaml` names the classes and the splits, in Ultralytics' or Roboflow's form; without it the splits are the
subfolders of `images/`, or folders that hold `images/` and `labels/`, and the classes those of `classes.txt`. The
numbers are relative to the image. A line with more corners is a polygon, which becomes its box. An image without a
text file has no objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import Problems, RawAnnotations
from ..detection import DetectionDataset
from ..errors import DatasetError
from ..images import images_in
from ..text import read_lines, read_yaml
from .source import (
    Source,
    dataset_of_files,
    drawn,
    finite,
    first_there,
    numbered_lines,
    sizes_of,
    subfolders,
)


CONFIGS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
NAME_FILES = ("classes.txt", "obj.names", "labels/classes.txt")
SPLITS = ("train", "val", "valid", "validation", "test")
BEYOND = 0.05  # of an image: boxes that reach so far are clipped, others are no relative boxes


def find_yolo(folder: Path, seed: int) -> Source | None:
    """The splits of a folder in this layout, or of a `data.yaml`; `None` for another layout."""
    if folder.suffix in (".yaml", ".yml") and folder.is_file():
        return _of_config(folder)
    config = first_there(folder / name for name in CONFIGS)
    if config is not None:
        return _of_config(config)
    places = _places_without_config(folder)
    if not places:
        return None
    names_file = first_there(folder / name for name in NAME_FILES)
    names = None if names_file is None else read_lines(names_file)
    if list(places) == [""]:  # one folder of images
        return Source(str(folder), ["train", "val"], partial(_load_part, places[""], names, seed))
    return Source(str(folder), list(places), partial(_load, places, names))


def _of_config(config: Path) -> Source:
    content = read_yaml(config)
    if not isinstance(content, dict) or not any(name in content for name in SPLITS):
        raise DatasetError(
            f"{config} must be a mapping with `names` and the splits train and val, got {content!r:.80}."
        )
    names = _names(content.get("names"), config)
    if content.get("nc", len(names)) != len(names):
        raise DatasetError(f"{config} has `nc` {content['nc']!r:.80}, but {len(names)} `names`.")
    splits = [name for name in SPLITS if content.get(name)]
    return Source(str(config), splits, partial(_load_config, config, content, names))


def _names(given: Any, config: Path) -> list[str]:
    """The class names, of a list or of a mapping from numbers."""
    if isinstance(given, Mapping) and all(isinstance(key, int) for key in given):
        if sorted(given) != list(range(len(given))):
            raise DatasetError(f"`names` of {config} must be numbered from 0 without gaps, got {sorted(given)[:10]}.")
        given = [given[number] for number in range(len(given))]
    if not isinstance(given, list) or not given:
        raise DatasetError(f"`names` of {config} must be the list of class names, got {given!r:.80}.")
    bad = [name for name in given if not isinstance(name, str | int | float | date) or given.count(name) > 1]
    if bad:
        raise DatasetError(f"`names` of {config} must be different words, got {bad[0]!r:.80} among them.")
    return [str(name) for name in given]


def _places_without_config(folder: Path) -> dict[str, Path]:
    """The image folders of the splits; the split of one folder without splits is called `""`."""
    if (folder / "images").is_dir() and (folder / "labels").is_dir():
        inner = [path for path in subfolders(folder / "images") if (folder / "labels" / path.name).is_dir()]
        return {path.name: path for path in inner} or {"": folder / "images"}
    parts = [path for path in subfolders(folder) if (path / "images").is_dir() and (path / "labels").is_dir()]
    return {path.name: path / "images" for path in parts}


def _load_config(
    config: Path, content: Mapping[str, Any], names: list[str], split: str, most: int | None
) -> DetectionDataset:
    """A split that `data.yaml` describes: folders, text files that list images, or several of them."""
    given = content[split]
    roots = [config.parent]
    if content.get("path"):
        roots.insert(0, config.parent / str(content["path"]))
    files: list[Path] = []
    for entry in given if isinstance(given, list) else [given]:
        text = str(entry).replace("\\", "/")
        inside = "/".join(part for part in text.split("/") if part != "..")  # Roboflow's ../train/images
        place = first_there([*(root / text for root in roots), *(root / inside for root in roots)])
        if place is None:
            raise DatasetError(
                f"{config} has the split {split} in {entry}, but there is no such folder or file below "
                f"{' or '.join(map(str, roots))}: correct the entry, or `path`."
            )
        files += images_in(place) if place.is_dir() else _listed(place, roots)
    return _dataset(files[:most], names, f"{config}, split {split}")


def _listed(file: Path, roots: list[Path]) -> list[Path]:
    """The images that a text file lists; those that are missing stay, and are named later."""
    found = []
    for line in read_lines(file):
        places = [root / line for root in (*roots, file.parent)]
        found.append(first_there(places) or places[0])
    return found


def _load(places: Mapping[str, Path], names: list[str] | None, split: str, most: int | None) -> DetectionDataset:
    return _dataset(images_in(places[split])[:most], names, str(places[split]))


def _load_part(place: Path, names: list[str] | None, seed: int, split: str, most: int | None) -> DetectionDataset:
    files = images_in(place)
    chosen = [files[i] for i in drawn(len(files), split, seed)]
    return _dataset(chosen[:most], names, f"{place}, split {split}")


def _dataset(files: list[Path], names: list[str] | None, source: str) -> DetectionDataset:
    problems = Problems(source)
    if not files:
        raise DatasetError(f"{source} has no images.")
    labels = [_label_file(file) for file in files]
    if not any(label.is_file() for label in labels):
        raise DatasetError(f"{source} has {len(files)} images, but no label file, such as {labels[0]}.")
    problems.add_missing(
        [i for i, f in enumerate(files) if not f.is_file()], lambda i: f"the image file {files[i]} is missing"
    )
    sizes = sizes_of(map(str, files))
    unread = [i for i, size in enumerate(sizes) if not size.all() and files[i].is_file() and labels[i].is_file()]
    problems.add(unread, lambda i: f"the size of {files[i]} cannot be read, by which its boxes are scaled")
    raw, numbers = _annotations(labels, sizes, None if names is None else len(names), problems)
    names = [str(number) for number in range(numbers)] if names is None else names
    return dataset_of_files([str(file) for file in files], range(len(files)), sizes, raw, names, problems)


def _label_file(image: Path) -> Path:
    """The text file of an image: in `labels` instead of the last `images` of its path, else beside it."""
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            return Path(*parts).with_suffix(".txt")
    return image.with_suffix(".txt")


def _annotations(
    labels: list[Path], sizes: np.ndarray, classes: int | None, problems: Problems
) -> tuple[RawAnnotations, int]:
    """The columns of all annotations, and the number of classes; a malformed line is a problem."""
    places: list[str] = []
    malformed: list[str] = []
    raw = RawAnnotations([], [], [], [], [], describe=places.__getitem__)
    for index, file in enumerate(labels):
        for place, line in numbered_lines(file, malformed) if file.is_file() else ():
            try:
                category, box = _parse(line.split(), classes)
            except ValueError as error:
                malformed.append(f"{place}: {error}")
                continue
            width, height = sizes[index].tolist()
            raw.image_index.append(index)
            raw.boxes.append([box[0] * width, box[1] * height, box[2] * width, box[3] * height])
            raw.categories.append(category)
            raw.areas.append(None)
            raw.crowds.append(0)
            places.append(place)
    problems.add(range(len(malformed)), malformed.__getitem__)
    return raw, max(raw.categories, default=-1) + 1


def _parse(fields: list[str], classes: int | None) -> tuple[int, list[float]]:
    """Class and box (x, y, width, height), relative to the image; a `ValueError` says what is wrong with the line."""
    if len(fields) != 5 and (len(fields) < 7 or len(fields) % 2 == 0):
        raise ValueError(
            f"an object must be a class and 4 numbers, or the corners of a polygon, got {len(fields)} fields"
        )
    category, numbers = _class(fields[0], classes), np.array([finite(field) for field in fields[1:]])
    if len(fields) == 5:
        x, y, width, height = numbers.tolist()
        low, high = [x - width / 2, y - height / 2], [x + width / 2, y + height / 2]
    else:
        corners = numbers.reshape(-1, 2)
        low, high = corners.min(0).tolist(), corners.max(0).tolist()
    if min(low) < -BEYOND or max(high) > 1 + BEYOND:
        raise ValueError(f"the box reaches from {low} to {high}, but must be relative to the image, in [0, 1]")
    return category, [low[0], low[1], high[0] - low[0], high[1] - low[1]]


def _class(text: str, classes: int | None) -> int:
    number = finite(text)
    if number != int(number) or number < 0 or (classes is not None and number >= classes):
        wanted = "a whole number from 0" if classes is None else f"one of 0 to {classes - 1}"
        raise ValueError(f"the class {text!r} is not {wanted}")
    return int(number)
