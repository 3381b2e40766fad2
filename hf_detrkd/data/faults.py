"""Finds data sets that would train to nothing, before a run: without boxes, with boxes in another format, or with
images that cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .checks import RELATIVE, Problems, of_each
from .detection import DetectionDataset
from .errors import DatasetError
from .records import ImageRecord, Records, RepairedBoxes, SelectedRecords


logger = logging.getLogger(__name__)

CheckImages = Literal["all", "sample", "none"]
SAMPLE = 100  # images of a split


def check_boxes(train: DetectionDataset, evaluation: DetectionDataset | None = None) -> None:
    """Checks that there is something to train on, and that the boxes look like pixels of their images.

    Raises:
        `DatasetError`: no training image has a box, or the boxes of a split seem to have another format.
    """
    nothing = nothing_to_learn(train)
    if nothing is not None:
        raise DatasetError(f"The training images cannot be trained on: {nothing}.")
    for name, data in (("training", train), ("evaluation", evaluation)):
        fault = None if data is None else repair_fault(data.repaired) or relative_fault(furthest(data.records))
        if fault is not None:
            raise DatasetError(f"The boxes of the {name} images look wrong: {fault}.")
    if evaluation is not None and not any(len(record.boxes) for record in evaluation.records):
        logger.warning("No evaluation image has a box: every mAP will be -1.")


def nothing_to_learn(data: DetectionDataset) -> str | None:
    """The reason why a data set has nothing to train on, or `None`."""
    crowds = 0
    for record in data.records:
        if not record.iscrowd.all():
            return None
        crowds += len(record.iscrowd)
    if crowds:
        return f"all {crowds} boxes are crowd regions (iscrowd is 1), which are not trained on"
    return f"none of the {len(data)} images has a box: are these the right annotations?"


def furthest(records: Records | Sequence[ImageRecord]) -> float:
    """The largest coordinate of a box in pixels, as far as needed to know that boxes are not relative; 0 without
    boxes."""
    largest = 0.0
    for record in records:
        if len(record.boxes):
            largest = max(largest, float((record.boxes[:, :2] + record.boxes[:, 2:]).max()))
        if largest > RELATIVE:
            break
    return largest


def relative_fault(largest: float) -> str | None:
    """The reason why boxes whose largest coordinate is this cannot be in pixels of their images, or `None`."""
    if not 0 < largest <= RELATIVE:
        return None
    return (
        f"no coordinate is above {largest:.3g}, so the boxes look normalised by the image size: write them as x, y, "
        "width, height in pixels"
    )


def repair_fault(repaired: RepairedBoxes | None) -> str | None:
    """The reason why the boxes of a split cannot be in pixels of their images; `None` if most needed no repair."""
    if repaired is None:
        return None
    outside = repaired.dropped + repaired.clipped
    if outside <= repaired.boxes / 2:
        return None
    return (
        f"{outside} of {repaired.boxes} boxes of {repaired.source} extend beyond their image: they look like x_min, "
        "y_min, x_max, y_max, or like boxes of larger images, but must be x, y, width, height in pixels of the image "
        "files"
    )


def check_images(data: DetectionDataset, name: str, mode: CheckImages) -> None:
    """Reads images once, so that a long run does not stop at one that cannot be read or has another size.

    Args:
        data ([`DetectionDataset`])
        name (`str`): of the split, in messages.
        mode (`str`): `all`; `sample`, [`SAMPLE`] images evenly spread; `none`.

    Raises:
        `DatasetError`: with all that is wrong.
    """
    if mode == "none":
        return
    count = {"all": len(data), "sample": min(SAMPLE, len(data))}[mode]
    chosen = SelectedRecords(data.records, np.linspace(0, len(data) - 1, count).round().astype(int))
    faults = [fault for fault in of_each(chosen, fault_of, f"Checking {name}") if fault]
    problems = Problems(f"The check of {count} of {len(data)} images ({name})")
    problems.add(range(len(faults)), faults.__getitem__)
    problems.raise_if_any()


def fault_of(record: ImageRecord) -> str | None:
    """What is wrong with an image, or `None`."""
    try:
        record.load()
    except DatasetError as error:
        return str(error).rstrip(".")
    return None
