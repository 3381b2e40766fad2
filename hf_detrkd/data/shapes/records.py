"""Records of the data set `shapes`, created on access."""

from __future__ import annotations

from functools import partial

import numpy as np
from PIL import Image

from ..records import ImageRecord, Records
from .rendering import render
from .scenes import Scene, draw_up


SHAPES_SIZES = {"train": 2000, "validation": 300, "test": 300}
CACHE_BYTES = 200 * 2**20


class ShapesRecords(Records):
    """The records of one split, created on access.

    Args:
        size (`int`): number of images.
        seed (`int`): seed of the data set, 0 or more, combined with the split.
        split (`str`): one of `SHAPES_SIZES`.
        image_size (`tuple[int, int]`): (height, width) in pixels; objects, 12 to 48 pixels on 128x128, scale with it.
        cache (`bool`, *optional*): keep annotations and rendered images in the memory of this process. On by default
            if all images of the split take less than 200 MiB.
    """

    def __init__(
        self, size: int, seed: int, split: str, image_size: tuple[int, int] = (128, 128), cache: bool | None = None
    ) -> None:
        self.size = size
        self.split = split
        self.image_size = image_size
        self._entropy = (seed, list(SHAPES_SIZES).index(split))
        fits = size * image_size[0] * image_size[1] * 3 <= CACHE_BYTES
        self.cache = fits if cache is None else cache
        self._records: dict[int, ImageRecord] = {}
        self._images: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> ImageRecord:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside a split of {self.size} images")
        record = self._records.get(index)
        if record is None:
            record = self._record(index)
            if self.cache:
                self._records[index] = record
        return record

    def scene(self, index: int) -> Scene:
        """The scene of one image, without rendering it."""
        return draw_up(np.random.default_rng([*self._entropy, index, 0]), *self.image_size)

    def image(self, index: int) -> Image.Image:
        """Renders one image, or takes it from the cache."""
        pixels = self._images.get(index)
        if pixels is None:
            pixels = render(self.scene(index), np.random.default_rng([*self._entropy, index, 1]), *self.image_size)
            if self.cache:
                self._images[index] = pixels
        return Image.fromarray(pixels)

    def _record(self, index: int) -> ImageRecord:
        shapes = self.scene(index).shapes
        corners = np.array([shape.box for shape in shapes])
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        return ImageRecord(
            image_id=index,
            name=f"shapes/{self.split}/{index}",
            load=partial(self.image, index),
            boxes=boxes,
            categories=np.array([shape.category for shape in shapes], dtype=np.int64),
            area=boxes[:, 2] * boxes[:, 3],
            iscrowd=np.zeros(len(shapes), dtype=bool),
            width=self.image_size[1],
            height=self.image_size[0],
        )
