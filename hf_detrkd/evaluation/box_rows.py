"""Boxes of many images as rows of structured arrays, and a file of them that grows in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


BOX: list[tuple[Any, ...]] = [("image", np.int64), ("label", np.int64), ("box", np.float64, 4)]
FOUND = np.dtype([*BOX, ("score", np.float64)])
TRUTH = np.dtype([*BOX, ("area", np.float64), ("iscrowd", np.int64)])
"""A detection and a ground-truth box: number of the image, `box` as COCO's (x, y, width, height) in pixels."""

COLUMNS = {FOUND: {"score": "scores"}, TRUTH: {"area": "area", "iscrowd": "iscrowd"}}


def rows_of(image: Mapping[str, Any], number: int, kind: np.dtype) -> np.ndarray:
    """The rows of one image.

    Args:
        image (`Mapping`): `boxes` (corners in pixels), `labels`, and `scores` or `area` and `iscrowd`: lists, arrays
            or tensors.
        number (`int`): of the image.
        kind (`numpy.dtype`): `FOUND` or `TRUTH`.
    """
    columns = {"label": "labels"} | COLUMNS[kind]
    missing = [name for name in ("boxes", *columns.values()) if name not in image]
    if missing:
        raise ValueError(f"an image must have boxes, {', '.join(columns.values())}, got {', '.join(image)}")
    corners = _array(image["boxes"]).astype(np.float64).reshape(-1, 4)
    rows = np.empty(len(corners), dtype=kind)
    rows["image"] = number
    rows["box"][:, :2] = corners[:, :2]
    rows["box"][:, 2:] = corners[:, 2:] - corners[:, :2]
    for name, given in columns.items():
        values = _array(image[given])
        if values.shape != (len(rows),):
            raise ValueError(f"{given} must be one for each of {len(rows)} boxes, got shape {values.shape}")
        rows[name] = values
    return rows


def _array(values: Any) -> np.ndarray:
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()  # numpy knows no bfloat16


class RowFile:
    """Rows in a file.

    Args:
        path (`Path`): the file, which is made by the first rows.
        kind (`numpy.dtype`): of the rows.
    """

    def __init__(self, path: Path, kind: np.dtype):
        self.path, self.kind = path, kind

    def append(self, rows: np.ndarray) -> None:
        with self.path.open("ab") as file:
            file.write(rows.tobytes())

    def read(self) -> np.ndarray:
        return np.fromfile(self.path, self.kind)

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
