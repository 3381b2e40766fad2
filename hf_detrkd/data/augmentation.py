"""How training images are varied: which transforms, how often, and from which seed.

Built on `torchvision.transforms.v2`. Randomness comes from one seed per image and epoch, so an image of an epoch is
the same in every process and after a resume.
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


SMALLEST_CROP = 16  # pixels


@dataclass(frozen=True)
class AugmentationConfig:
    """How training images are varied. Each probability at 0 switches its part off.

    Example:
        ```python
        >>> AugmentationConfig(iou_crop=0.0)  # everything but crops
        >>> AugmentationConfig.flip_only()
        ```
    """

    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of mirroring left and right."})
    scale_jitter: float = field(default=0.5, metadata={"help": "Probability of zooming by a random factor."})
    min_scale: float = field(default=0.6, metadata={"help": "Smallest zoom; below 1 the image shrinks on black."})
    max_scale: float = field(default=1.6, metadata={"help": "Largest zoom; above 1 a part of the image fills it."})
    iou_crop: float = field(default=0.3, metadata={"help": "Probability of SSD's crop that keeps a box in view."})
    photometric: float = field(default=0.5, metadata={"help": "Probability of SSD's colour distortions."})
    min_visible: float = field(
        default=0.25, metadata={"help": "Share of a box that a crop has to leave, or the box is removed."}
    )

    def __post_init__(self) -> None:
        for name in ("horizontal_flip", "scale_jitter", "iou_crop", "photometric", "min_visible"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"`{name}` has to lie in [0, 1], but is {vars(self)[name]}.")
        if not 0 < self.min_scale <= self.max_scale:
            raise ValueError(
                f"`min_scale` and `max_scale` have to be positive and ordered, but are {self.min_scale} and "
                f"{self.max_scale}."
            )

    @classmethod
    def flip_only(cls) -> AugmentationConfig:
        """Mirrored or not, and nothing else: two views of an image, which a teacher can answer once and for all."""
        return cls(scale_jitter=0.0, iou_crop=0.0, photometric=0.0)

    @classmethod
    def none(cls) -> AugmentationConfig:
        """Training on the images as they are."""
        return cls(horizontal_flip=0.0, scale_jitter=0.0, iou_crop=0.0, photometric=0.0)


class RandomZoom(v2.Transform):
    """Cuts a window of 1 / scale times the image's sides at a random place; what lies outside the image is black.

    A following resize to a fixed size makes this the usual scale jitter, with the image's aspect ratio kept.
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

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


class RandomBoxCrop(v2.RandomIoUCrop):
    """SSD's crop, which leaves images without boxes and images of a few pixels as they are."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        boxes = v2.get_bounding_boxes(flat_inputs)
        if len(boxes) == 0 or min(v2.query_size(flat_inputs)) < SMALLEST_CROP:
            return {}
        return super().make_params(flat_inputs)


def applied(transforms: list[tuple[float, v2.Transform]], *inputs: Any) -> Any:
    """Each transform with its probability; one draw each, whether it is applied or not."""
    for probability, transform in transforms:
        if float(torch.rand(())) < probability:
            inputs = transform(*inputs)
    return inputs


def item_seed(seed: int, epoch: int, index: int) -> int:
    """One 64-bit seed of three numbers (0 or more); neighbours give unrelated seeds."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from torch's CPU generator inside come from `seed`, and its state is as before afterwards.

    `torch.manual_seed` would seed the accelerators too, whose state could only be put back by a synchronisation.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
