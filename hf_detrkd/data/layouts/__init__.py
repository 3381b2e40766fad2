"""The layouts of data sets that are read, each in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import DatasetError
from .coco import find_coco, find_single_coco
from .kitti import find_kitti
from .rows import find_rows
from .source import Source
from .voc import find_voc
from .yolo import find_yolo


LAYOUTS: dict[str, Callable[[Path, int], Source | None]] = {
    "COCO (annotations/instances_<split>.json, or <split>/_annotations.coco.json beside the images)": find_coco,
    "KITTI (image_2/, label_2/)": find_kitti,
    "YOLO (data.yaml, images/, labels/)": find_yolo,
    "Pascal VOC (Annotations/*.xml, JPEGImages/, or XML beside the images)": find_voc,
    "rows of the datasets library (save_to_disk, Parquet or Arrow files, an imagefolder with metadata)": find_rows,
    "COCO JSON files in the folder itself": find_single_coco,
}
"""Finds the source of a folder, by the layout's description; the first that fits is taken."""


def source_of(folder: Path, seed: int, labeled: bool = True) -> Source | None:
    """The data set in a folder, in the first layout that fits; `None` if none does.

    Args:
        folder (`Path`): or the `data.yaml` of YOLO's layout.
        seed (`int`): of random splits.
        labeled (`bool`): the annotations are wanted; otherwise rows need not have any.

    Raises:
        `DatasetError`: it is another file.
    """
    if folder.is_file() and folder.suffix not in (".yaml", ".yml"):
        raise DatasetError(f"A data set is a folder, or the data.yaml of a YOLO folder, but {folder} is another file.")
    for find in LAYOUTS.values() if folder.is_dir() else [find_yolo]:
        source = find_rows(folder, seed, labeled) if find is find_rows else find(folder, seed)
        if source is not None:
            return source
    return None


def find_source(folder: Path, seed: int) -> Source:
    """The data set in a folder, see [`source_of`].

    Raises:
        `DatasetError`: it has none of the layouts.
    """
    source = source_of(folder, seed)
    if source is not None:
        return source
    inside = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    more = f" and {len(inside) - 10} more" if len(inside) > 10 else ""
    raise DatasetError(
        f"{folder} has none of the layouts that are read: {'; '.join(LAYOUTS)}. It contains "
        f"{', '.join(inside[:10]) or 'nothing'}{more}."
    )
