"""Validates annotations before training and reports all problems at once.

Problems that cannot be repaired without guessing (an unknown category, a box with three numbers, a missing file) are
collected into one [`DatasetError`]. Common labelling errors (a box without extent, or one that extends beyond its
image) are dropped or clipped, and counted in one warning per split.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets.utils import tqdm

from .errors import DatasetError, UnreadableImageError
from .records import AnnotationTable, ImageRecord, Records, RepairedBoxes


logger = logging.getLogger(__name__)

_NAMED = 10
_THIN = 1e-3
RELATIVE = 1.5  # pixels: boxes that reach no further are relative to their image


class Problems:
    """Collects the problems of one split, and describes the first ten.

    Args:
        source (`str`): name of the split in messages, such as the path of its JSON.

    Attributes:
        count (`int`): of all problems.
        missing (`int`): of those that are missing image files, which may be left out.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.count = 0
        self.missing = 0
        self.named: list[str] = []

    def add(self, offenders: Iterable[int], describe: Callable[[int], str]) -> None:
        """Adds one problem for each offender; only those to be printed are described."""
        for offender in offenders:
            self.count += 1
            if len(self.named) < _NAMED:
                self.named.append(describe(offender))

    def add_missing(self, files: Sequence[int], describe: Callable[[int], str]) -> None:
        """Adds a missing image file for each of these numbers."""
        self.missing += len(files)
        self.add(files, describe)

    def raise_if_any(self, but_missing: bool = False) -> None:
        """
        Args:
            but_missing (`bool`, *optional*, defaults to `False`): missing image files alone are no error.

        Raises:
            `DatasetError`: with the number of problems and the first ten.
        """
        if self.count == (self.missing if but_missing else 0):
            return
        first = "; ".join(self.named)
        more = f" (the first {_NAMED} of them)" if self.count > _NAMED else ""
        noun = "problem" if self.count == 1 else "problems"
        raise DatasetError(f"{self.source} has {self.count} {noun} to correct before training{more}: {first}.")


@dataclass
class RawAnnotations:
    """Unchecked annotations, with one entry of each list per annotation and values of any type.

    Attributes:
        image_index (`list[int]`): position of the image; the only checked column.
        boxes, categories: `bbox` and the source's category id.
        areas, crowds: `None` if the source has none.
        describe (`Callable[[int], str]`): name of an annotation in messages, such as `"annotation 17"`.
    """

    image_index: list[int]
    boxes: list[Any]
    categories: list[Any]
    areas: list[Any]
    crowds: list[Any]
    describe: Callable[[int], str]


def check_annotations(
    raw: RawAnnotations, sizes: np.ndarray, class_of: Mapping[int, int], problems: Problems, warns: bool = True
) -> AnnotationTable:
    """Checks every annotation, drops and clips boxes, and sorts the rest by image.

    Args:
        raw ([`RawAnnotations`])
        sizes (`numpy.ndarray` of shape `(num_images, 2)`): (width, height) in pixels; 0 where unknown, not clipped.
        class_of (`Mapping[int, int]`): class index by category id of the source.
        problems ([`Problems`]): earlier problems, to which those of the annotations are added.
        warns (`bool`, *optional*, defaults to `True`): log one warning if boxes were dropped or clipped.

    Raises:
        `DatasetError`: if there is any problem but missing image files.
    """
    name = raw.describe
    values = raw.boxes
    not_four = [i for i, box in enumerate(values) if not _is_box(box)]
    problems.add(
        not_four, lambda i: f"{name(i)} has the box {_short(values[i])}, not four numbers x, y, width, height"
    )
    skip = set(not_four)
    endless = [i for i, box in enumerate(values) if i not in skip and not all(map(is_finite, box))]
    problems.add(endless, lambda i: f"{name(i)} has the box {_short(values[i])}, which is not finite")
    unknown = [i for i, category in enumerate(raw.categories) if type(category) is not int or category not in class_of]
    problems.add(unknown, lambda i: f"{name(i)} has the unknown category {_short(raw.categories[i])}")
    areas = [i for i, area in enumerate(raw.areas) if area is not None and not is_finite(area)]
    problems.add(areas, lambda i: f"{name(i)} has the area {_short(raw.areas[i])}, which is not a finite number")
    crowds = [i for i, crowd in enumerate(raw.crowds) if crowd not in (None, 0, 1)]
    problems.add(crowds, lambda i: f"{name(i)} has iscrowd {_short(raw.crowds[i])}, which is neither 0 nor 1")
    problems.raise_if_any(but_missing=True)

    image_index = np.array(raw.image_index, dtype=np.int64)
    boxes = np.array(values, dtype=np.float64).reshape(-1, 4)
    boxes, keep, repaired = _clip(boxes, sizes[image_index], problems.source, warns)
    area = np.array([math.nan if area is None else area for area in raw.areas], dtype=np.float64)
    area = np.where(np.isnan(area), boxes[:, 2] * boxes[:, 3], area)
    order = np.argsort(image_index, kind="stable")
    order = order[keep[order]]
    return AnnotationTable(
        offsets=np.searchsorted(image_index[order], np.arange(len(sizes) + 1)),
        boxes=boxes[order],
        categories=np.array([class_of[category] for category in raw.categories], dtype=np.int64)[order],
        area=area[order],
        iscrowd=np.array([bool(crowd) for crowd in raw.crowds], dtype=bool)[order],
        repaired=repaired,
    )


def _clip(
    boxes: np.ndarray, sizes: np.ndarray, source: str, warns: bool
) -> tuple[np.ndarray, np.ndarray, RepairedBoxes]:
    """Boxes `(num_boxes, 4)` clipped to their images, a mask of the kept ones, and counts, which are logged if
    `warns`."""
    limit = np.where(sizes > 0, sizes, np.inf)
    low = np.where(sizes > 0, 0, -np.inf)
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    new_start, new_end = np.clip(start, low, limit), np.clip(end, low, limit)
    keep = (boxes[:, 2:] > 0).all(1) & (new_end - new_start > _THIN).all(1)
    moved = (np.abs(new_start - start) > _THIN).any(1) | (np.abs(new_end - end) > _THIN).any(1)
    furthest = float(end.max(initial=0))
    found = RepairedBoxes(source, len(boxes), int((~keep).sum()), int((moved & keep).sum()), furthest)
    if warns:
        warn_of(found)
    changed = np.concatenate([new_start, new_end - new_start], axis=1)
    return np.where((moved & keep)[:, None], changed, boxes), keep, found


def warn_of(found: RepairedBoxes) -> None:
    """Logs one warning if boxes were dropped or clipped, and one if all look relative to their image."""
    if found:
        logger.warning(
            "%s: %d boxes: dropped %d with no area inside the image, clipped %d to the image.",
            *(found.source, found.boxes, found.dropped, found.clipped),
        )
    if 0 < found.furthest <= RELATIVE:
        logger.warning(
            "%s: no coordinate is above %.3g: are the boxes relative to the image?", found.source, found.furthest
        )


def find_readable_images(records: Records | Sequence[ImageRecord], source: str) -> np.ndarray:
    """Reads every image once; returns the positions of those that can be decoded, the same in all processes.

    Raises:
        `DatasetError`: if no image can be read, or if the size of one is not the annotated one.
    """

    def is_readable(record: ImageRecord) -> bool:
        try:
            record.load()
        except UnreadableImageError:
            return False
        return True

    readable = np.array(of_each(records, is_readable, f"Reading the images of {source}"), dtype=bool)
    bad = np.flatnonzero(~readable)
    if len(bad) == len(records):
        raise DatasetError(f"None of the {len(records)} images of {source} can be read.")
    if len(bad):
        names = ", ".join(records[int(i)].name for i in bad[:_NAMED])
        logger.warning("%s: %d images cannot be read and were dropped, among them %s.", source, len(bad), names)
    return np.flatnonzero(readable)


def of_each(records: Records | Sequence[ImageRecord], look: Callable[[ImageRecord], Any], title: str) -> list[Any]:
    """What a function that reads an image says of each, from several threads and with a progress bar."""
    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(look, records), total=len(records), desc=title))


def repeated(values: list[Any]) -> list[int]:
    """Positions of values that occur earlier in the list."""
    first = {value: i for i, value in reversed(list(enumerate(values)))}
    return [i for i, value in enumerate(values) if first[value] != i]


def _is_box(box: Any) -> bool:
    return isinstance(box, list | tuple) and len(box) == 4 and all(type(value) in (int, float) for value in box)


def is_finite(value: Any) -> bool:
    """True for a finite number that a double holds; a bool is none."""
    try:
        return type(value) in (int, float) and math.isfinite(float(value))
    except OverflowError:  # a whole number that no double holds
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
