"""Converts an image and its boxes to the detector's input tensors: augmentation, resizing, normalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .augmentation import AugmentationConfig, DetrCrop, RandomBoxCrop, RandomZoom, applied, seeded
from .frame import Frame
from .image_size import ImageSize
from .pixels import to_float
from .processor import NO_NORMALIZATION, normalization_of, size_of
from .records import ImageRecord


VERSION = 2  # of the random draws: a seed gives other images since the last change


class DetectionTransform:
    """Makes the tensors of one image. Pass it to [`DetectionDataset.with_transform`].

    Boxes are always normalised by the resized image, never by a padded canvas: original DETR checkpoints predict in
    this frame and `post_process_object_detection` expects it.

    Args:
        size (`tuple[int, int]`, `dict[str, int]` or [`ImageSize`]): (height, width) in pixels, or an image processor's
            `size`. A fixed `height` and `width` changes the aspect ratio and needs no padding. `shortest_edge`,
            optionally with `longest_edge`, and `max_height` with `max_width` keep it; items then have a `pixel_mask`
            and [`DetectionCollator`] pads them.
        image_mean (`Sequence[float]`, *optional*): per channel, in [0, 1]; `None` for no normalisation.
        image_std (`Sequence[float]`, *optional*): per channel, in [0, 1].
        augmentation ([`AugmentationConfig`], *optional*): augmentation of training images. `None` makes this an
            evaluation transform: nothing is random, and labels also contain the crowd boxes.
        teacher_size (*optional*): like `size`. If it differs from `size`, items also contain the same augmented
            image at this size, as `teacher_pixel_values` (and `teacher_pixel_mask`), normalised for the student.
        normalize (`bool`, *optional*, defaults to `True`): make floats of the pixels. Otherwise they stay bytes, and
            items have `normalization` besides: [`DistillationTrainer`] makes floats of them on the device.

    Raises:
        `ValueError`: if `size` has neither of the two forms, only one of mean and standard deviation is given, or the
            augmentation's `short_sides` have no size that keeps the aspect ratio.
    """

    def __init__(
        self,
        size: tuple[int, int] | Mapping[str, int] | ImageSize,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        augmentation: AugmentationConfig | None = None,
        teacher_size: tuple[int, int] | Mapping[str, int] | None = None,
        normalize: bool = True,
    ) -> None:
        self.size = size if isinstance(size, ImageSize) else ImageSize.parse(size)
        self.teacher_size = None if teacher_size is None else ImageSize.parse(teacher_size)
        if self.teacher_size == self.size:
            self.teacher_size = None
        if (image_mean is None) != (image_std is None):
            raise ValueError("Give both `image_mean` and `image_std`, or neither for no normalisation.")
        self.image_mean, self.image_std = _rounded(image_mean), _rounded(image_std)
        mean_std = ([0.0] * 3, [1.0] * 3) if image_mean is None or image_std is None else (image_mean, image_std)
        self.mean_std = torch.tensor(mean_std).view(2, 3, 1, 1)
        self.normalize = normalize
        self.augmentation = augmentation
        config = augmentation or AugmentationConfig.none()
        self._geometric = [
            (config.scale_jitter, RandomZoom(config.min_scale, config.max_scale)),
            (config.iou_crop, RandomBoxCrop(trials=10)),
            *([(config.detr_crop, DetrCrop())] if config.detr_crop else []),  # no draw for what is off
            (config.horizontal_flip, v2.RandomHorizontalFlip(p=1.0)),
        ]
        self.short_sides = config.short_sides or []
        if self.short_sides and (self.size.shortest_edge is None or self.teacher_size is not None):
            raise ValueError(
                "`short_sides` needs a size with a `shortest_edge`, the same for student and teacher, got "
                f"{self.size} and {self.teacher_size}: set --keep_aspect_ratio true, and no --teacher_image_size."
            )
        self._photometric, self._distort = config.photometric, v2.RandomPhotometricDistort()

    @classmethod
    def for_processor(
        cls,
        processor: Any,
        augmentation: AugmentationConfig | None = None,
        size: tuple[int, int] | None = None,
        teacher_size: tuple[int, int] | Mapping[str, int] | None = None,
        normalize: bool = True,
    ) -> DetectionTransform:
        """The transform equivalent to an image processor of transformers.

        Args:
            processor: image processor with `size`, `do_normalize`, `image_mean` and `image_std`.
            augmentation ([`AugmentationConfig`], *optional*): `None` for evaluation.
            size (`tuple[int, int]`, *optional*): (height, width); default: the processor's.
            teacher_size, normalize (*optional*): see the class.
        """
        mean, std = normalization_of(processor)
        plain = (mean, std) == NO_NORMALIZATION
        mean_std: tuple[Any, Any] = (None, None) if plain else (mean, std)
        return cls(size or size_of(processor), *mean_std, augmentation, teacher_size, normalize)

    def described(self) -> dict[str, Any]:
        """What the tensors of an image depend on, as plain values; without the teacher's own size."""
        return {
            "size": {name: side for name, side in asdict(self.size).items() if side},
            "image_mean": self.image_mean,
            "image_std": self.image_std,
            "augmentation": None if self.augmentation is None else {"version": VERSION} | asdict(self.augmentation),
        }

    @property
    def pads(self) -> bool:
        """True if images keep their aspect ratio, so that batches must be padded."""
        return self.size.keeps_ratio

    def __call__(self, image: Image.Image, record: ImageRecord, seed: int) -> dict[str, Any]:
        """
        Args:
            image (`PIL.Image.Image`): RGB.
            record ([`ImageRecord`]): its annotations.
            seed (`int`): seed of all randomness in this call; the global generators are left unchanged.

        Returns:
            `dict`: `pixel_values` (`torch.FloatTensor` of shape `(3, height, width)`), `pixel_mask`
            (`torch.LongTensor` of shape `(height, width)`, ones) when images are padded, `placed` (`torch.Tensor` of
            shape `(4,)`), where the original image lies in it (see [`Frame`]), and `labels`:
            `image_id` `(1,)`, `class_labels` `(num_boxes,)`, `boxes` `(num_boxes, 4)` as (cx, cy, w, h) in [0, 1] of
            the image, `area` `(num_boxes,)` in pixels of the original image, `iscrowd` `(num_boxes,)` zeros,
            `orig_size` `(2,)` and `size` `(2,)` as (height, width); for evaluation also `crowd_boxes`, `crowd_labels`
            and `crowd_area`; and `labeled` (`bool`), false, if nobody labelled the image.
        """
        canvas = (image.height, image.width)
        crowd = torch.from_numpy(record.iscrowd)
        all_boxes = torch.from_numpy(record.boxes).float()
        boxes = tv_tensors.BoundingBoxes(all_boxes[~crowd], format="XYWH", canvas_size=canvas)
        pixels = tv_tensors.Image(F.pil_to_tensor(image))
        with seeded(seed):
            pixels, boxes, frame = applied(self._geometric, pixels, boxes, Frame.of(*canvas))
            kept = self._in_view(all_boxes[~crowd], boxes)
            left = tv_tensors.wrap(boxes[kept], like=boxes)
            wanted = self._drawn_size()
            pixels = self._in_other_colours(pixels, wanted)
            item = {} if self.teacher_size is None else self._for_teacher(pixels, boxes.canvas_size, self.teacher_size)
            size = wanted.of(*boxes.canvas_size)
            pixels, boxes, frame = (_resized(one, size) for one in (pixels, left, frame))
        area = torch.from_numpy(record.area).float()
        classes = torch.from_numpy(record.categories)
        labels: dict[str, Any] = {
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
        if not record.labeled:
            labels["labeled"] = False
        item |= {"pixel_values": self._values(pixels), "labels": labels, "placed": frame.placed()}
        if not self.normalize:
            item["normalization"] = self.mean_std
        if self.pads:
            item["pixel_mask"] = torch.ones(size, dtype=torch.int64)
        return item

    def _in_other_colours(self, pixels: Tensor, wanted: ImageSize) -> Tensor:
        """Distorts the colours, by chance: once for both views, and of no more pixels than the larger one has."""
        if float(torch.rand(())) >= self._photometric:
            return pixels
        sizes = [size.of(*pixels.shape[-2:]) for size in (wanted, self.teacher_size) if size is not None]
        largest = max(sizes, key=math.prod)
        if math.prod(pixels.shape[-2:]) > math.prod(largest):
            pixels = _resized(pixels, largest)
        return F.pil_to_tensor(self._distort(F.to_pil_image(pixels)))  # Pillow takes half the time of tensors

    def _for_teacher(self, pixels: Tensor, canvas: tuple[int, int], wanted: ImageSize) -> dict[str, Any]:
        """The same image at the teacher's size."""
        size = wanted.of(*canvas)
        item: dict[str, Any] = {"teacher_pixel_values": self._values(_resized(pixels, size))}
        if wanted.keeps_ratio:
            item["teacher_pixel_mask"] = torch.ones(size, dtype=torch.int64)
        return item

    def _drawn_size(self) -> ImageSize:
        """The size of this image: with `short_sides` one of them, drawn at random."""
        if not self.short_sides:
            return self.size
        return replace(self.size, shortest_edge=self.short_sides[int(torch.randint(len(self.short_sides), ()))])

    def _in_view(self, before: Tensor, after: Tensor) -> Tensor:
        """Boxes that the crops kept, bool `(num_boxes,)`. Crops do not scale, so areas are comparable."""
        least = 0.0 if self.augmentation is None else self.augmentation.min_visible
        area = after[:, 2] * after[:, 3]
        return (area > 0) & (area >= least * before[:, 2] * before[:, 3])

    def _values(self, pixels: Tensor) -> Tensor:
        plain = pixels.as_subclass(Tensor)
        return to_float(plain, self.mean_std) if self.normalize else plain


def _rounded(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [round(float(value), 6) for value in values]


def _resized(value: Any, size: tuple[int, int]) -> Any:
    """An image, boxes or a frame at another (height, width)."""
    now = value.canvas_size if hasattr(value, "canvas_size") else value.shape[-2:]
    return value if tuple(now) == size else F.resize(value, list(size), antialias=True)


def _normalised(boxes: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Boxes `(num_boxes, 4)` from (x, y, w, h) in pixels to (cx, cy, w, h) in [0, 1]."""
    height, width = canvas
    boxes = boxes.as_subclass(Tensor).reshape(-1, 4)
    return box_convert(boxes, "xywh", "cxcywh") / torch.tensor([width, height, width, height], dtype=torch.float32)
