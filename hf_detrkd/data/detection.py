"""The map-style detection data set for every source."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from .augmentation import item_seed
from .checks import Problems
from .records import ImageRecord, Records, RepairedBoxes, SelectedRecords, labeled_of
from .transforms import DetectionTransform


class Answers(Protocol):
    """Stored answers of a teacher."""

    moved: bool
    """The teacher saw each image as it is, and its answers move with the augmentation."""

    def read(self, image_id: int, view: int) -> dict[str, torch.Tensor]:
        """The answers to one view of an image, by name."""

    def read_moved(self, image_id: int, placed: torch.Tensor, least: float) -> dict[str, torch.Tensor]:
        """The answers to an image, where the view shows them; `least` is the share of a box that must be visible."""

    def as_labels(self, columns: dict[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Labels that take the place of unknown ones, made from the answers, and the answers that go with them."""


class DetectionDataset(Dataset):
    """Images with boxes, read on access.

    Args:
        records (`Records` or `Sequence[ImageRecord]`): checked records.
        classes (`Sequence[str]`): class names, in the order of the indices that the records use.
        category_ids (`Sequence[int]`, *optional*): the source's own id of each class; 0, 1, ... if it has none.
        repaired ([`RepairedBoxes`], *optional*): counts of boxes that were dropped or clipped.
        problems ([`Problems`], *optional*): its missing image files.

    Attributes:
        records, classes, category_ids, repaired, problems: as above, classes and ids as lists.
        transform ([`DetectionTransform`], *optional*): set by [`~DetectionDataset.with_transform`].
        seed (`int`): seed of the augmentation.
        views (`int`, *optional*), answers (*optional*): see [`~DetectionDataset.with_transform`] and
            [`~DetectionDataset.with_answers`].

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
        problems: Problems | None = None,
    ) -> None:
        self.records = records
        self.repaired = repaired
        self.problems = problems
        self.classes = list(classes)
        self.category_ids = list(range(len(self.classes)) if category_ids is None else category_ids)
        self.transform: DetectionTransform | None = None
        self.seed = 0
        self.views: int | None = None
        self.answers: Answers | None = None
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
        if self.views is not None:
            return self.view_of(index, self.epoch % self.views)
        record = self.records[index]
        item = self.transform(record.load(), record, item_seed(self.seed, self.epoch, index))
        return self._with_answers(item, 0)

    def view_of(self, index: int, view: int) -> dict[str, Any]:
        """One of the `views` of an image, with the stored answers to it if there are any."""
        assert self.transform is not None
        record = self.records[index]
        item = self.transform(record.load(), record, item_seed(self.seed, view, record.image_id % 2**64))
        return self._with_answers(item | {"view": view}, view)

    def _with_answers(self, item: dict[str, Any], view: int) -> dict[str, Any]:
        """Adds the stored answers to a view, if there are any; those that move with the augmentation are all of view
        0."""
        if self.answers is None:
            return item
        image, labels = int(item["labels"]["image_id"]), item["labels"]
        if self.answers.moved:
            augmentation = None if self.transform is None else self.transform.augmentation
            least = 0.0 if augmentation is None else augmentation.min_visible
            view, answers = 0, self.answers.read_moved(image, item["placed"], least)
        else:
            answers = self.answers.read(image, view)
        if not labels.get("labeled", True):
            made, answers = self.answers.as_labels(answers)
            labels = labels | made
        return item | {"view": view, "labels": labels, "answers": answers}

    def with_transform(
        self, transform: DetectionTransform, seed: int = 0, views: int | None = None
    ) -> DetectionDataset:
        """A copy with the same records and the given transform.

        Args:
            transform ([`DetectionTransform`])
            seed (`int`, *optional*, defaults to 0): seed of the augmentation, 0 or more.
            views (`int`, *optional*): number of augmented views of each image, which come back in turn, one an epoch:
                a view depends only on the seed, its number and the image's id. Default: a new one every epoch.
        """
        if views is not None and views < 1:
            raise ValueError(f"`views` must be at least 1, got {views}.")
        dataset = copy.copy(self)
        dataset.transform, dataset.seed, dataset.views = transform, seed, views
        dataset.answers, dataset._epoch = None, _shared_zero()
        return dataset

    def with_answers(self, answers: Answers) -> DetectionDataset:
        """A copy whose items also contain a teacher's stored answers to their view, as `answers`.

        Raises:
            `ValueError`: the data set has no `views`, so that its images do not come back, and the answers do not move
                with the augmentation.
        """
        if self.views is None and not answers.moved:
            raise ValueError("Stored answers need images that come back: call `with_transform` with `views`.")
        dataset = copy.copy(self)
        dataset.answers, dataset._epoch = answers, _shared_zero()
        return dataset

    def images_hash(self) -> str:
        """A hash of the ids and fingerprints of all images."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(f"{record.image_id}:{record.fingerprint};".encode())
        return digest.hexdigest()

    def described(self) -> dict[str, Any]:
        """What the tensors of an image depend on, apart from the image: transform, seed and number of views."""
        transform = {} if self.transform is None else self.transform.described()
        return transform | {"seed": self.seed, "views": self.views}

    def select(self, indices: Sequence[int] | np.ndarray) -> DetectionDataset:
        """The images at these positions, in this order."""
        return self.with_records(SelectedRecords(self.records, indices))

    def with_records(self, records: Records | Sequence[ImageRecord]) -> DetectionDataset:
        """A copy with other images of the same classes."""
        dataset = copy.copy(self)
        dataset.records, dataset._epoch = records, _shared_zero()
        return dataset

    def labeled(self) -> np.ndarray:
        """Which images are labelled, bool `(num_images,)`."""
        return labeled_of(self.records)

    @property
    def epoch(self) -> int:
        """The epoch of the augmentation."""
        return int(self._epoch)

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
