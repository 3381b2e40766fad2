"""Training augmentation with per-image seeds.

Built on `torchvision.transforms.v2`. Each image and epoch has its own seed, so the augmented image is the same
in every process and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .checks import is_finite


SMALLEST_CROP = 16  # pixels
LARGEST_ZOOM = 100
DETR_SHORT_SIDES, DETR_CROP = (400, 500, 600), (384, 600)  # pixels, of DETR's crop


@dataclass(frozen=True)
class AugmentationConfig:
    """Augmentation of training images. A probability of 0 disables its transform.

    Example:
        ```python
        >>> AugmentationConfig(iou_crop=0.0)  # everything except crops
        >>> AugmentationConfig.flip_only()
        ```
    """

    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip. Default: 0.5."})
    scale_jitter: float = field(
        default=0.5, metadata={"help": "Probability of zooming by a random factor. Default: 0.5."}
    )
    min_scale: float = field(
        default=0.6, metadata={"help": "Smallest zoom; below 1 the image shrinks on black. Default: 0.6."}
    )
    max_scale: float = field(
        default=1.6, metadata={"help": "Largest zoom; above 1 the image is cropped. Default: 1.6."}
    )
    iou_crop: float = field(default=0.3, metadata={"help": "Probability of SSD's random IoU crop. Default: 0.3."})
    photometric: float = field(
        default=0.5, metadata={"help": "Probability of SSD's colour distortions. Default: 0.5."}
    )
    detr_crop: float = field(
        default=0.0,
        metadata={
            "help": "Probability of DETR's crop: 384 to 600 pixels of the image with a short side of 400, 500 or 600. "
            "Default: 0. [DETR: 0.5]"
        },
    )
    short_sides: list[int] | None = field(
        default=None,
        metadata={
            "help": "Short sides in pixels, one of which is drawn for each training image; needs a size that keeps "
            "the aspect ratio, whose long side stays the limit. Default: the size's own. [DETR: 480 512 544 ... 800]"
        },
    )
    min_visible: float = field(
        default=0.25,
        metadata={"help": "A box of which a crop leaves less than this fraction is removed. Default: 0.25."},
    )

    def __post_init__(self) -> None:
        for name in ("horizontal_flip", "scale_jitter", "iou_crop", "photometric", "detr_crop", "min_visible"):
            if not is_finite(vars(self)[name]) or not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {vars(self)[name]!r:.80}.")
        scales = self.min_scale, self.max_scale
        if not all(map(is_finite, scales)) or not 0 < self.min_scale <= self.max_scale <= LARGEST_ZOOM:
            raise ValueError(
                f"`min_scale` and `max_scale` must be positive and ordered, at most {LARGEST_ZOOM}, got "
                f"{self.min_scale!r:.40} and {self.max_scale!r:.40}."
            )
        if self.short_sides is not None and not _are_pixels(self.short_sides):
            raise ValueError(f"`short_sides` must be numbers of pixels, got {self.short_sides!r:.80}.")

    @classmethod
    def flip_only(cls) -> AugmentationConfig:
        """Only horizontal flips: two views of each image, for which teacher predictions could be cached."""
        return cls(scale_jitter=0.0, iou_crop=0.0, photometric=0.0)

    @classmethod
    def none(cls) -> AugmentationConfig:
        """No augmentation."""
        return cls(horizontal_flip=0.0, scale_jitter=0.0, iou_crop=0.0, photometric=0.0)


def _are_pixels(sides: Any) -> bool:
    """True for a list of whole numbers of pixels."""
    return isinstance(sides, list) and bool(sides) and all(type(one) is int and 0 < one < 2**20 for one in sides)


class Window(v2.Transform):
    """Cuts the window that `make_params` draws; outside the image it is black."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


class RandomZoom(Window):
    """Cuts a window of 1 / scale times the image's sides at a random place; outside the image it is black.

    Followed by a resize to a fixed size, this is the usual scale jitter at a constant aspect ratio.
    """

    def __init__(self, min_scale: float, max_scale: float) -> None:
        super().__init__()
        self.min_scale, self.max_scale = min_scale, max_scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        scale = self.min_scale + (self.max_scale - self.min_scale) * float(torch.rand(()))
        window = max(1, round(height / scale)), max(1, round(width / scale))
        top, left = (
            round(float(torch.rand(())) * (old - new)) for old, new in zip((height, width), window, strict=True)
        )
        return {"top": top, "left": left, "height": window[0], "width": window[1]}


class DetrCrop(Window):
    """DETR's random crop, of the image as it is: DETR resizes before and after the crop, which is the same window."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        short = DETR_SHORT_SIDES[int(torch.randint(len(DETR_SHORT_SIDES), ()))]
        scale = short / min(height, width)
        least, most = DETR_CROP
        window = []
        for side in (height, width):
            pixels = int(torch.randint(least, max(least, min(round(side * scale), most)) + 1, ()))
            window.append(min(side, max(1, round(pixels / scale))))
        top, left = (
            int(torch.randint(side - part + 1, ())) for side, part in zip((height, width), window, strict=True)
        )
        return {"top": top, "left": left, "height": window[0], "width": window[1]}


class RandomBoxCrop(v2.RandomIoUCrop):
    """SSD's crop, except for images without boxes or of a few pixels, which are left unchanged."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        boxes = v2.get_bounding_boxes(flat_inputs)
        if len(boxes) == 0 or min(v2.query_size(flat_inputs)) < SMALLEST_CROP:
            return {}
        return super().make_params(flat_inputs)


def applied(transforms: list[tuple[float, v2.Transform]], *inputs: Any) -> Any:
    """Applies each transform with its probability; always one random draw per transform."""
    for probability, transform in transforms:
        if float(torch.rand(())) < probability:
            inputs = transform(*inputs)
    return inputs


def item_seed(seed: int, epoch: int, index: int) -> int:
    """One 64-bit seed of three numbers (0 or more); neighbours give unrelated seeds."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator, and restores its state on exit.

    `torch.manual_seed` would also seed the accelerators, whose state can only be restored with a synchronisation.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
