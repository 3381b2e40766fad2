"""The map-style detection data set for every source."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .augmentation import item_seed
from .records import ImageRecord, Records, RepairedBoxes, SelectedRecords
from .transforms import DetectionTransform


class DetectionDataset(Dataset):
    """Images with boxes, read on access.

    Args:
        records (`Records` or `Sequence[ImageRecord]`): checked records.
        classes (`Sequence[str]`): class names, in the order of the indices that the records use.
        category_ids (`Sequence[int]`, *optional*): the source's own id of each class; 0, 1, ... if it has none.
        repaired ([`RepairedBoxes`], *optional*): counts of boxes that were dropped or clipped.

    Attributes:
        records, classes, category_ids, repaired: as above, classes and ids as lists.
        transform ([`DetectionTransform`], *optional*): set by [`~DetectionDataset.with_transform`].
        seed (`int`): seed of the augmentation.

    Example:
        ```python
        >>> splits = load_detection_splits("shapes")
        >>> transform = DetectionTransform((128, 128), augmentation=AugmentationConfig())
        >>> train = splits.train.with_transform(transform, seed=1)
        >>> train.set_epoch(3)
        >>> train[0]["labels"]["boxes"]
        ```
    """

    def __init__(
        self,
        records: Records | Sequence[ImageRecord],
        classes: Sequence[str],
        category_ids: Sequence[int] | None = None,
        repaired: RepairedBoxes | None = None,
    ) -> None:
        self.records = records
        self.repaired = repaired
        self.classes = list(classes)
        self.category_ids = list(range(len(self.classes)) if category_ids is None else category_ids)
        self.transform: DetectionTransform | None = None
        self.seed = 0
        self._epoch = _shared_zero()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The tensors of one image, see [`DetectionTransform`]; they depend only on (seed, epoch, index).

        Raises:
            `ValueError`: before `with_transform`.
            `UnreadableImageError`: if the image cannot be decoded.
            `DatasetError`: if the image's size is not the annotated one.
        """
        if self.transform is None:
            raise ValueError("The data set has no transform: call `with_transform(DetectionTransform(...))` first.")
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)} images")
        index %= len(self)
        record = self.records[index]
        return self.transform(record.load(), record, item_seed(self.seed, int(self._epoch), index))

    def with_transform(self, transform: DetectionTransform, seed: int = 0) -> DetectionDataset:
        """A copy with the same records and the given transform.

        Args:
            transform ([`DetectionTransform`])
            seed (`int`, *optional*, defaults to 0): seed of the augmentation, 0 or more.
        """
        dataset = copy.copy(self)
        dataset.transform, dataset.seed, dataset._epoch = transform, seed, _shared_zero()
        return dataset

    def select(self, indices: Sequence[int] | np.ndarray) -> DetectionDataset:
        """The images at these positions, in this order."""
        dataset = copy.copy(self)
        dataset.records, dataset._epoch = SelectedRecords(self.records, indices), _shared_zero()
        return dataset

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the augmentation, also in `DataLoader` workers that are already running."""
        self._epoch.fill_(epoch)

    def coco_ground_truth(self) -> dict[str, list[dict[str, Any]]]:
        """All annotations as a COCO dict (`images`, `annotations`, `categories`) with the source's own category ids.

        Boxes are the checked ones (clipped, none degenerate), in pixels of the original images; crowd boxes are
        included. Images of unknown size are read.
        """
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for record in self.records:
            width, height = record.width, record.height
            if width is None or height is None:
                width, height = record.load().size
            images.append({"id": record.image_id, "width": width, "height": height, "file_name": record.name})
            columns = zip(
                record.boxes.tolist(),
                record.categories.tolist(),
                record.area.tolist(),
                record.iscrowd.tolist(),
                strict=True,
            )
            for box, category, area, crowd in columns:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": record.image_id,
                        "category_id": self.category_ids[category],
                        "bbox": box,
                        "area": area,
                        "iscrowd": int(crowd),
                    }
                )
        pairs = zip(self.category_ids, self.classes, strict=True)
        return {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": category_id, "name": name} for category_id, name in pairs],
        }


def _shared_zero() -> torch.Tensor:
    """A zero in memory shared with forked and spawned workers."""
    return torch.zeros((), dtype=torch.int64).share_memory_()
