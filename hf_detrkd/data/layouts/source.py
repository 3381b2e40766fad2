"""A data set in some layout: its splits, and how one is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..checks import Problems, RawAnnotations, check_annotations, repeated
from ..detection import DetectionDataset
from ..errors import DatasetError
from ..images import read_image, read_size
from ..records import AnnotationTable, TableRecords
from ..text import read_text


VAL_SHARE = 0.2  # of a data set without splits


@dataclass(frozen=True)
class Source:
    """The splits of a data set, and a function that loads at most a given number of images of one.

    Attributes:
        name (`str`): in messages.
        splits (`list[str]`)
        load (`Callable[[str, int | None], DetectionDataset]`): called with a split and the most images.
    """

    name: str
    splits: list[str]
    load: Callable[[str, int | None], DetectionDataset]


def dataset_of_files(
    files: Sequence[str],
    image_ids: Sequence[int],
    sizes: np.ndarray,
    raw: RawAnnotations,
    classes: Sequence[str],
    problems: Problems,
    category_ids: Sequence[int] | None = None,
) -> DetectionDataset:
    """The data set of image files with their annotations, which are checked here.

    Args:
        files (`Sequence[str]`), image_ids (`Sequence[int]`): one per image.
        sizes (`numpy.ndarray` of shape `(num_images, 2)`): (width, height) in pixels, 0 where unknown.
        raw ([`RawAnnotations`]): with category ids of `category_ids`.
        classes (`Sequence[str]`): in the order of the category ids.
        problems ([`Problems`]): found so far.
        category_ids (`Sequence[int]`, *optional*): by default 0, 1, ...

    Raises:
        `DatasetError`: for all problems at once, unless image files are missing and nothing else.
    """
    ids = list(range(len(classes)) if category_ids is None else category_ids)
    table = check_annotations(raw, sizes, {one: place for place, one in enumerate(ids)}, problems)
    return dataset_of_table(files, np.array(image_ids, dtype=np.int64), sizes, table, classes, problems, ids)


def dataset_of_table(
    files: Sequence[str],
    image_ids: np.ndarray,
    sizes: np.ndarray,
    table: AnnotationTable,
    classes: Sequence[str],
    problems: Problems,
    category_ids: Sequence[int],
) -> DetectionDataset:
    """The data set of image files with annotations that are checked already; arguments of [`dataset_of_files`]."""
    paths = list(files)
    records = TableRecords(image_ids, paths.__getitem__, sizes, partial(_read, paths), table)
    return DetectionDataset(records, classes, category_ids, table.repaired, problems)


def sizes_of(files: Iterable[str]) -> np.ndarray:
    """(width, height) of images from their headers, `(num_images, 2)`; 0 where a file cannot be read."""
    return np.array([read_size(file) for file in files], dtype=np.int64).reshape(-1, 2)


def by_stem(files: Sequence[Path], problems: Problems) -> dict[str, Path]:
    """Files of one folder by their names without suffix; two of one name are a problem."""
    files = sorted(files)
    names = [path.stem for path in files]
    problems.add(
        repeated(names), lambda i: f"{files[i].parent.name} contains both {files[i].name} and {files[i - 1].name}"
    )
    return dict(zip(names, files, strict=True))


def drawn(count: int, split: str, seed: int) -> list[int]:
    """The places of one side of a random split of `count` images into `train` and `val`, 8 : 2, in their order."""
    order = np.random.default_rng(seed).permutation(count)
    num_val = round(VAL_SHARE * count)
    return sorted((order[:num_val] if split == "val" else order[num_val:]).tolist())


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def first_there(places: Iterable[Path]) -> Path | None:
    """The first path that exists; one that the system does not take as a name does not."""
    return next((place for place in places if os.path.exists(place)), None)


def numbered_lines(file: Path, malformed: list[str]) -> Iterator[tuple[str, str]]:
    """All lines of a text file that are not blank, each after its name in messages; a file that is no text is added to
    `malformed`."""
    try:
        lines = read_text(file).splitlines()
    except DatasetError as error:
        malformed.append(str(error).rstrip("."))
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{file.parent.name}/{file.name}, line {number}", line


def finite(text: str, name: str = "number") -> float:
    """A finite number from a text field; a `ValueError` says that it is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"the {name} {text!r} is not a finite number")
    return value


def _read(files: list[str], index: int) -> Image.Image:
    return read_image(files[index], files[index])
