"""Images that nobody labelled, beside those of a training set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from .detection import DetectionDataset
from .errors import DatasetError
from .images import images_in, read_image, read_size
from .records import ImageRecord, Records, SelectedRecords, labeled_of


NO_BOXES = np.zeros((0, 4))
NO_CLASSES = np.zeros(0, dtype=np.int64)


class UnlabeledRecords(Records):
    """The images of other records, whose labels are unknown. Their ids are negative, so that they differ from those of
    labelled images: image 7 becomes -8.

    Args:
        records (`Records` or `Sequence[ImageRecord]`)
    """

    def __init__(self, records: Records | Sequence[ImageRecord]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> ImageRecord:
        record, none = self.records[index], np.zeros(0)
        return replace(
            record,
            image_id=-1 - record.image_id,
            boxes=NO_BOXES,
            categories=NO_CLASSES,
            area=none,
            iscrowd=none.astype(bool),
            labeled=False,
        )

    def labeled(self) -> np.ndarray:
        return np.zeros(len(self), dtype=bool)


class JoinedRecords(Records):
    """The records of two lists, one after the other."""

    def __init__(self, first: Records | Sequence[ImageRecord], second: Records | Sequence[ImageRecord]) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> ImageRecord:
        if index < len(self.first):
            return self.first[index]
        return self.second[index - len(self.first)]

    def labeled(self) -> np.ndarray:
        return np.concatenate([labeled_of(self.first), labeled_of(self.second)])


class ImageFiles(Records):
    """The image files of a folder, in the order of their paths."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, list(names)
        self._sizes = np.zeros((len(self.names), 2), dtype=np.int32)  # (width, height), 0 until it is asked for

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> ImageRecord:
        path, none = self.folder / self.names[index], np.zeros(0)
        if not self._sizes[index].any():
            self._sizes[index] = read_size(path)
        width, height = self._sizes[index].tolist()
        load = partial(_read, path)
        size = (width or None, height or None)
        return ImageRecord(index, str(path), load, NO_BOXES, NO_CLASSES, none, none.astype(bool), *size, labeled=False)

    def labeled(self) -> np.ndarray:
        return np.zeros(len(self), dtype=bool)


def image_files(folder: Path) -> ImageFiles:
    """All images below a folder.

    Raises:
        `DatasetError`: there are none.
    """
    names = sorted(str(path.relative_to(folder)) for path in images_in(folder))
    if not names:
        raise DatasetError(f"The folder {folder} holds no images.")
    return ImageFiles(folder, names)


def with_unlabeled(dataset: DetectionDataset, records: Records | Sequence[ImageRecord]) -> DetectionDataset:
    """The images of a data set, and after them further ones without their labels."""
    return dataset.with_records(JoinedRecords(dataset.records, UnlabeledRecords(records)))


def split_labels(dataset: DetectionDataset, fraction: float, seed: int) -> tuple[DetectionDataset, Records]:
    """Keeps the labels of a random part of the images.

    Args:
        dataset ([`DetectionDataset`])
        fraction (`float`): share of the images that stay labelled, above 0 and below 1; at least one image does.
        seed (`int`): of the choice.

    Returns:
        `tuple` of [`DetectionDataset`] and `Records`: the labelled images, and the others.
    """
    order = np.random.default_rng(seed).permutation(len(dataset))
    count = max(1, round(fraction * len(dataset)))
    return dataset.select(np.sort(order[:count])), SelectedRecords(dataset.records, np.sort(order[count:]))


def _read(path: Path) -> Image.Image:
    return read_image(path, str(path))
