"""Images with annotations before any transform, and lazy lists of them that use little memory."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import DatasetError


@dataclass(frozen=True)
class ImageRecord:
    """A lazily read image and its checked annotations.

    Attributes:
        image_id (`int`): unique in its split.
        name (`str`): file name or description, for error messages.
        load (`Callable[[], PIL.Image.Image]`): reads the image as RGB, rotated by its EXIF orientation.
        boxes (`numpy.ndarray` of shape `(num_boxes, 4)`): float64, COCO `(x, y, width, height)` in pixels of the
            rotated image, inside it and never empty.
        categories (`numpy.ndarray` of shape `(num_boxes,)`): int64 index into the classes of the data set.
        area (`numpy.ndarray` of shape `(num_boxes,)`): float64, in pixels of the original image, for the evaluator.
        iscrowd (`numpy.ndarray` of shape `(num_boxes,)`): bool, true for a box around a group of objects.
        width (`int`, *optional*): pixels, where known without decoding the image.
        height (`int`, *optional*): pixels.
        labeled (`bool`): false if nobody labelled the image: its objects are unknown, which is not the same as none.
    """

    image_id: int
    name: str
    load: Callable[[], Image.Image]
    boxes: np.ndarray
    categories: np.ndarray
    area: np.ndarray
    iscrowd: np.ndarray
    width: int | None = None
    height: int | None = None
    labeled: bool = True

    @property
    def fingerprint(self) -> int:
        """63 bits of a hash of the file's name, the size and the annotations: stored answers know an image by it."""
        text = f"{Path(self.name).name}|{self.width}x{self.height}|{len(self.boxes)}"
        parts = (self.boxes.round(3), self.categories, self.iscrowd)
        digest = hashlib.sha256(text.encode())
        for part in parts:
            digest.update(np.ascontiguousarray(part).tobytes())
        return int.from_bytes(digest.digest()[:8], "little") >> 1


class Records(ABC):
    """A list of records that are created on access."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> ImageRecord: ...

    def __iter__(self) -> Iterator[ImageRecord]:
        return (self[index] for index in range(len(self)))

    def labeled(self) -> np.ndarray:
        """Which images are labelled, bool `(num_images,)`, known without creating the records."""
        return np.ones(len(self), dtype=bool)


@dataclass(frozen=True)
class RepairedBoxes:
    """Boxes of a split that were dropped or clipped when it was read.

    Attributes:
        source (`str`): name of the split in messages, such as the path of its JSON.
        boxes (`int`): annotated boxes.
        dropped (`int`): those without area inside their image.
        clipped (`int`): those clipped to their image.
        furthest (`float`): the largest coordinate of the boxes as annotated, in pixels.
    """

    source: str
    boxes: int
    dropped: int
    clipped: int
    furthest: float = 0.0

    def __bool__(self) -> bool:
        return self.dropped + self.clipped > 0


@dataclass(frozen=True)
class AnnotationTable:
    """The annotations of a split, sorted by image: those of image `i` are rows `offsets[i]` to `offsets[i + 1]` of the
    columns, which are those of [`ImageRecord`]. Also the counts of repaired boxes. Forked workers share the arrays."""

    offsets: np.ndarray
    boxes: np.ndarray
    categories: np.ndarray
    area: np.ndarray
    iscrowd: np.ndarray
    repaired: RepairedBoxes


class TableRecords(Records):
    """Records over an annotation table.

    Args:
        image_ids (`numpy.ndarray` of shape `(num_images,)`)
        name (`Callable[[int], str]`): name of the image at a position in error messages.
        sizes (`numpy.ndarray` of shape `(num_images, 2)`): annotated (width, height) in pixels, 0 where unknown.
        read (`Callable[[int], PIL.Image.Image]`): reads the image at a position.
        table ([`AnnotationTable`])
    """

    def __init__(
        self,
        image_ids: np.ndarray,
        name: Callable[[int], str],
        sizes: np.ndarray,
        read: Callable[[int], Image.Image],
        table: AnnotationTable,
    ) -> None:
        self.image_ids, self.name, self.sizes, self.read, self.table = image_ids, name, sizes, read, table

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> ImageRecord:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a split of {len(self)} images")
        rows = slice(self.table.offsets[index], self.table.offsets[index + 1])
        width, height = self.sizes[index].tolist()
        return ImageRecord(
            image_id=int(self.image_ids[index]),
            name=self.name(index),
            load=partial(self.load, index),
            boxes=self.table.boxes[rows],
            categories=self.table.categories[rows],
            area=self.table.area[rows],
            iscrowd=self.table.iscrowd[rows],
            width=width or None,
            height=height or None,
        )

    def load(self, index: int) -> Image.Image:
        """
        Raises:
            `UnreadableImageError`: if the image cannot be decoded.
            `DatasetError`: if its size is not the annotated one, which would misplace its boxes.
        """
        image = self.read(index)
        annotated = tuple(self.sizes[index].tolist())
        if 0 not in annotated and image.size != annotated:
            raise DatasetError(
                f"The image {self.name(index)} is {image.width}x{image.height} pixels after its EXIF orientation, "
                f"but its annotations say {annotated[0]}x{annotated[1]}: correct the annotations or the file."
            )
        return image


class SelectedRecords(Records):
    """The records at some positions of others, still lazy."""

    def __init__(self, records: Records | Sequence[ImageRecord], indices: Sequence[int] | np.ndarray) -> None:
        self.records = records
        self.indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> ImageRecord:
        return self.records[int(self.indices[index])]

    def labeled(self) -> np.ndarray:
        return labeled_of(self.records)[self.indices]


def labeled_of(records: Records | Sequence[ImageRecord]) -> np.ndarray:
    """Which of the images are labelled, bool `(num_images,)`."""
    if isinstance(records, Records):
        return records.labeled()
    return np.array([record.labeled for record in records], dtype=bool)
