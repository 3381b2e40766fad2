"""From an image and its boxes to the tensors that a detector takes: augmentation, resizing, normalisation.

Built on `torchvision.transforms.v2`. Randomness comes from one seed per call, so an image of an epoch is the same in
every process and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .records import ImageRecord


_SMALLEST_CROP = 16


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
            if not 0 <= self.__dict__[name] <= 1:
                raise ValueError(f"`{name}` has to lie in [0, 1], but is {self.__dict__[name]}.")
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
        if len(boxes) == 0 or min(v2.query_size(flat_inputs)) < _SMALLEST_CROP:
            return {}
        return super().make_params(flat_inputs)


@dataclass(frozen=True)
class ImageSize:
    """A fixed `height` and `width`, or the `shortest_edge` (and the most that the `longest_edge` may have), pixels."""

    height: int = 0
    width: int = 0
    shortest_edge: int | None = None
    longest_edge: int | None = None

    def of(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image of a given size gets."""
        if self.shortest_edge is None:
            return self.height, self.width
        scale = self.shortest_edge / min(height, width)
        if self.longest_edge is not None:
            scale = min(scale, self.longest_edge / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))


class DetectionTransform:
    """Makes the tensors of one image. Pass it to [`DetectionDataset.with_transform`].

    Boxes are always normalised by the image as it is resized, never by a padded canvas: the frame in which original
    DETR checkpoints answer and in which `post_process_object_detection` reads their answers.

    Args:
        size (`tuple[int, int]` or `dict[str, int]`): (height, width) in pixels, or an image processor's `size`. A
            fixed `height` and `width` changes the aspect ratio and needs no padding. `shortest_edge`, optionally with
            `longest_edge`, keeps it; then items carry a `pixel_mask` and [`DetectionCollator`] pads them.
        image_mean (`Sequence[float]`, *optional*): of the channels in [0, 1]; `None` for no normalisation.
        image_std (`Sequence[float]`, *optional*): of the channels in [0, 1].
        augmentation ([`AugmentationConfig`], *optional*): how training images vary. `None` makes this an evaluation
            transform: nothing is random, and labels also hold the crowd boxes.
        teacher_size (*optional*): like `size`. Where the teacher sees another size, items hold the same augmented
            image once more, as `teacher_pixel_values` (and `teacher_pixel_mask`), normalised for the student.

    Raises:
        `ValueError`: if `size` is neither of the two forms, or only one of mean and standard deviation is given.
    """

    def __init__(
        self,
        size: tuple[int, int] | Mapping[str, int],
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        augmentation: AugmentationConfig | None = None,
        teacher_size: tuple[int, int] | Mapping[str, int] | None = None,
    ) -> None:
        self.size = _parse_size(size)
        self.teacher_size = None if teacher_size is None else _parse_size(teacher_size)
        if self.teacher_size == self.size:
            self.teacher_size = None
        if (image_mean is None) != (image_std is None):
            raise ValueError("Give both `image_mean` and `image_std`, or neither for no normalisation.")
        self.image_mean = None if image_mean is None else torch.tensor(image_mean).view(3, 1, 1)
        self.image_std = None if image_std is None else torch.tensor(image_std).view(3, 1, 1)
        self.augmentation = augmentation
        config = augmentation or AugmentationConfig.none()
        self._geometric = [
            (config.scale_jitter, RandomZoom(config.min_scale, config.max_scale)),
            (config.iou_crop, RandomBoxCrop(trials=10)),
        ]
        self._on_resized = [
            (config.horizontal_flip, v2.RandomHorizontalFlip(p=1.0)),
            (config.photometric, v2.RandomPhotometricDistort()),
        ]

    @classmethod
    def for_processor(
        cls,
        processor: Any,
        augmentation: AugmentationConfig | None = None,
        size: tuple[int, int] | None = None,
        teacher_size: tuple[int, int] | Mapping[str, int] | None = None,
    ) -> DetectionTransform:
        """The transform that makes what an image processor of transformers makes.

        Args:
            processor: image processor with `size`, `do_normalize`, `image_mean` and `image_std`.
            augmentation ([`AugmentationConfig`], *optional*): `None` for evaluation.
            size (`tuple[int, int]`, *optional*): (height, width) in place of the processor's.
            teacher_size (*optional*): see the class.
        """
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (None, None)
        return cls(size or dict(processor.size), mean, std, augmentation, teacher_size)

    @property
    def pads(self) -> bool:
        """Whether images keep their aspect ratio, so that a batch has to be padded."""
        return self.size.shortest_edge is not None

    def __call__(self, image: Image.Image, record: ImageRecord, seed: int) -> dict[str, Any]:
        """
        Args:
            image (`PIL.Image.Image`): RGB.
            record ([`ImageRecord`]): its annotations.
            seed (`int`): of everything random in this call; the global generators are left untouched.

        Returns:
            `dict`: `pixel_values` (`torch.FloatTensor` of shape `(3, height, width)`), `pixel_mask`
            (`torch.LongTensor` of shape `(height, width)`, ones) when images are padded, and `labels`:
            `image_id` `(1,)`, `class_labels` `(num_boxes,)`, `boxes` `(num_boxes, 4)` as (cx, cy, w, h) in [0, 1] of
            the image, `area` `(num_boxes,)` in pixels of the original image, `iscrowd` `(num_boxes,)` zeros,
            `orig_size` `(2,)` and `size` `(2,)` as (height, width); for evaluation also `crowd_boxes`, `crowd_labels`
            and `crowd_area`.
        """
        canvas = (image.height, image.width)
        crowd = torch.from_numpy(record.iscrowd)
        all_boxes = torch.from_numpy(record.boxes).float()
        boxes = tv_tensors.BoundingBoxes(all_boxes[~crowd], format="XYWH", canvas_size=canvas)
        pixels = tv_tensors.Image(F.pil_to_tensor(image))
        with seeded(seed):
            pixels, boxes = _apply(self._geometric, pixels, boxes)
            kept = self._in_view(all_boxes[~crowd], boxes)
            left = tv_tensors.wrap(boxes[kept], like=boxes)
            item = {} if self.teacher_size is None else self._for_teacher(pixels, left, self.teacher_size)
            pixels, boxes = _apply(self._on_resized, *self._resize(pixels, left, self.size))
        area = torch.from_numpy(record.area).float()
        classes = torch.from_numpy(record.categories)
        size = boxes.canvas_size
        labels = {
            "image_id": torch.tensor([record.image_id]),
            "class_labels": classes[~crowd][kept],
            "boxes": _normalised(boxes, size),
            "area": area[~crowd][kept],
            "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
            "orig_size": torch.tensor(canvas),
            "size": torch.tensor(size),
        }
        if self.augmentation is None:
            crowd_boxes = _normalised(all_boxes[crowd], canvas)
            labels |= {"crowd_boxes": crowd_boxes, "crowd_labels": classes[crowd], "crowd_area": area[crowd]}
        item |= {"pixel_values": self._to_float(pixels), "labels": labels}
        if self.pads:
            item["pixel_mask"] = torch.ones(size, dtype=torch.int64)
        return item

    def _for_teacher(self, pixels: Tensor, boxes: tv_tensors.BoundingBoxes, size: ImageSize) -> dict[str, Any]:
        """The same image as the teacher sees it: what is drawn next will be drawn for the student again."""
        state = torch.get_rng_state()
        varied, _ = _apply(self._on_resized, *self._resize(pixels, boxes, size))
        torch.set_rng_state(state)
        item: dict[str, Any] = {"teacher_pixel_values": self._to_float(varied)}
        if size.shortest_edge is not None:
            item["teacher_pixel_mask"] = torch.ones(varied.shape[-2:], dtype=torch.int64)
        return item

    def _in_view(self, before: Tensor, after: Tensor) -> Tensor:
        """Which boxes crops left over, bool `(num_boxes,)`. Crops do not scale, so areas compare."""
        least = 0.0 if self.augmentation is None else self.augmentation.min_visible
        area = after[:, 2] * after[:, 3]
        return (area > 0) & (area >= least * before[:, 2] * before[:, 3])

    def _resize(
        self, pixels: Tensor, boxes: tv_tensors.BoundingBoxes, wanted: ImageSize
    ) -> tuple[Tensor, tv_tensors.BoundingBoxes]:
        size = wanted.of(*boxes.canvas_size)
        if size == tuple(boxes.canvas_size):
            return pixels, boxes
        return F.resize(pixels, list(size), antialias=True), F.resize(boxes, list(size))

    def _to_float(self, pixels: Tensor) -> Tensor:
        values = pixels.as_subclass(Tensor).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        if self.image_mean is not None and self.image_std is not None:
            values.sub_(self.image_mean).div_(self.image_std)
        return values


def parse_image_size(text: str | None, argument: str = "image_size") -> tuple[int, int] | None:
    """Height and width in pixels from the `argument` `128` or `320x256` of a command line; `None` stays `None`.

    Raises:
        `ValueError`: if it is neither a number nor HEIGHTxWIDTH.
    """
    if text is None:
        return None
    numbers = str(text).lower().split("x")
    if len(numbers) > 2 or not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise ValueError(f"--{argument} must be a number or HEIGHTxWIDTH, got {text!r}.")
    return int(numbers[0]), int(numbers[-1])


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


def _apply(transforms: list[tuple[float, v2.Transform]], *inputs: Any) -> Any:
    """Each transform with its probability; one draw each, whether it is applied or not."""
    for probability, transform in transforms:
        if float(torch.rand(())) < probability:
            inputs = transform(*inputs)
    return inputs


def _normalised(boxes: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Boxes `(num_boxes, 4)` from (x, y, w, h) in pixels to (cx, cy, w, h) in [0, 1]."""
    height, width = canvas
    boxes = boxes.as_subclass(Tensor).reshape(-1, 4)
    return box_convert(boxes, "xywh", "cxcywh") / torch.tensor([width, height, width, height], dtype=torch.float32)


def _parse_size(size: tuple[int, int] | Mapping[str, int]) -> ImageSize:
    """A size in either of its forms."""
    if not isinstance(size, Mapping):
        size = dict(zip(("height", "width"), size, strict=True))
    if set(size) == {"height", "width"} and min(size.values()) > 0:
        return ImageSize(size["height"], size["width"])
    if set(size) in ({"shortest_edge"}, {"shortest_edge", "longest_edge"}) and min(size.values()) > 0:
        return ImageSize(shortest_edge=size["shortest_edge"], longest_edge=size.get("longest_edge"))
    raise ValueError(
        f"`size` has to be (height, width), or have the keys height and width, or shortest_edge and optionally "
        f"longest_edge, all positive, but is {dict(size)}."
    )
