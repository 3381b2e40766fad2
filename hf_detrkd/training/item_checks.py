"""Checks a few items of a data set that is not ours, by name, before they reach a model."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import DetectionDataset, DetectionStream, RowStream


LOOKED_AT = 4
BEYOND = 0.05  # of an image, by which a box may leave it


def check_items(dataset: Any, name: str, num_classes: int, evaluates: bool = False) -> None:
    """Checks items that are spread over a data set.

    Args:
        dataset: anything with a length and items, or a [`RowStream`]; others are not looked at.
        name (`str`): argument of the trainer, in messages.
        num_classes (`int`): the student's.
        evaluates (`bool`): an evaluation with detections needs `image_id` and `orig_size`.

    Raises:
        ValueError: what is wrong with an item, and what is wanted.
    """
    if isinstance(dataset, DetectionDataset | DetectionStream):
        return
    if isinstance(dataset, RowStream):
        items = list(enumerate(islice(dataset, LOOKED_AT)))
    elif isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        places = np.linspace(0, len(dataset) - 1, min(LOOKED_AT, len(dataset))).round().astype(int).tolist()
        items = [(place, dataset[place]) for place in places]
    else:
        return
    for place, item in items:
        fault = fault_of(item, num_classes, evaluates)
        if fault is not None:
            raise ValueError(f"Item {place} of {name} {fault}.")


def fault_of(item: Any, num_classes: int, evaluates: bool) -> str | None:
    """What is wrong with an item, or `None`."""
    if not isinstance(item, Mapping) or not {"pixel_values", "labels"} <= item.keys():
        found = sorted(item) if isinstance(item, Mapping) else type(item).__name__
        return f"must be a dict with pixel_values and labels, got {found}"
    pixels, labels = item["pixel_values"], item["labels"]
    floats = isinstance(pixels, Tensor) and (pixels.is_floating_point() or "normalization" in item)
    if not floats or pixels.ndim != 3:
        return f"must have normalised pixel_values, floats of shape (3, height, width), got {described(pixels)}"
    if not isinstance(labels, Mapping) or not {"class_labels", "boxes"} <= labels.keys():
        found = sorted(labels) if isinstance(labels, Mapping) else type(labels).__name__
        return f"must have labels with class_labels and boxes, got {found}"
    return _labels_fault(labels["class_labels"], labels["boxes"], num_classes) or _metric_fault(labels, evaluates)


def _labels_fault(classes: Any, boxes: Any, num_classes: int) -> str | None:
    if not isinstance(classes, Tensor) or classes.ndim != 1 or classes.is_floating_point():
        return f"must have class_labels of whole numbers (num_boxes,), got {described(classes)}"
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point() or boxes.numel() != 4 * len(classes):
        return f"must have boxes of floats ({len(classes)}, 4), one for each of class_labels, got {described(boxes)}"
    if not len(classes):
        return None
    least, most = int(classes.min()), int(classes.max())
    if least < 0 or most >= num_classes:
        return f"has class_labels from {least} to {most}, but the student's classes are 0 to {num_classes - 1}"
    if not bool(boxes.isfinite().all()):
        return "has boxes that are not finite"
    if float(boxes.max()) > 1 + BEYOND or float(boxes.min()) < -BEYOND:
        return (
            f"has boxes up to {float(boxes.max()):.4g}, but they must be (center_x, center_y, width, height) in "
            "[0, 1] of the image: divide pixels by the image's width and height"
        )
    ends = boxes.reshape(-1, 4)[:, :2] + boxes.reshape(-1, 4)[:, 2:] / 2
    if float(ends.max()) > 1 + 4 * BEYOND:
        return "has boxes that leave their image: they must be (center_x, center_y, width, height), not corners"
    return None


def _metric_fault(labels: Mapping[str, Any], evaluates: bool) -> str | None:
    missing = [name for name in ("image_id", "orig_size") if name not in labels]
    if not evaluates or not missing:
        return None
    return (
        f"has no {missing[0]} in its labels, which an evaluation needs: image_id (1,), and orig_size (2,), height and "
        "width of the original image"
    )


def described(value: Any) -> str:
    """A value in a message: shape and type of a tensor, else its type."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
