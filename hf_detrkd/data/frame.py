"""Where the original image lies in its augmented view."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F


class Frame(tv_tensors.TVTensor):
    """Follows the corners of an image through geometric transforms: six numbers, the left, top, right and bottom of
    the original image and the width and height of the view, in pixels of the view. The left is right of the right in a
    mirrored view, and corners may lie outside of the view.

    torchvision's transforms move it as they move boxes, but never clip it.
    """

    @classmethod
    def of(cls, height: int, width: int) -> Frame:
        """The frame of an image that nothing has changed yet."""
        return tv_tensors.wrap(torch.tensor([0.0, 0.0, width, height, width, height]), like=_EXAMPLE)

    def placed(self) -> Tensor:
        """Shift and scale `(x, y, x, y)` that take normalised coordinates of the original to those of the view."""
        left, top, right, bottom, width, height = self.tolist()
        return torch.tensor([left / width, top / height, (right - left) / width, (bottom - top) / height])


_EXAMPLE = torch.zeros(6).as_subclass(Frame)


def _changed(frame: Frame, scale: tuple[float, float], shift: tuple[float, float], size: tuple[float, float]) -> Frame:
    """Corners times `scale` plus `shift`, both (x, y), in a view of `size` (width, height)."""
    left, top, right, bottom, *_ = frame.as_subclass(Tensor).tolist()
    xs = (scale[0] * x + shift[0] for x in (left, right))
    ys = (scale[1] * y + shift[1] for y in (top, bottom))
    (left, right), (top, bottom) = tuple(xs), tuple(ys)
    return tv_tensors.wrap(torch.tensor([left, top, right, bottom, *size]), like=frame)


@F.register_kernel(functional=F.crop, tv_tensor_cls=Frame)
def _crop(frame: Frame, top: int, left: int, height: int, width: int) -> Frame:
    return _changed(frame, (1, 1), (-left, -top), (width, height))


@F.register_kernel(functional=F.horizontal_flip, tv_tensor_cls=Frame)
def _flip(frame: Frame) -> Frame:
    width, height = frame.as_subclass(Tensor).tolist()[4:]
    return _changed(frame, (-1, 1), (width, 0), (width, height))


@F.register_kernel(functional=F.resize, tv_tensor_cls=Frame)
def _resize(frame: Frame, size: list[int], *_: Any, **__: Any) -> Frame:
    width, height = frame.as_subclass(Tensor).tolist()[4:]
    return _changed(frame, (size[1] / width, size[0] / height), (0, 0), (size[1], size[0]))


def moved(boxes: Tensor, placed: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes of the original image in its view.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): cxcywh in [0, 1] of the original.
        placed (`torch.Tensor` of shape `(4,)`): see [`Frame.placed`].

    Returns:
        `tuple` of two `torch.Tensor`: the boxes, clipped where the view cuts the image, with sides of at least 0.1 %,
        `(..., 4)`; and the share of each box that the view shows, in [0, 1], `(...)`.
    """
    shift, scale = placed[:2], placed[2:]
    centers, sizes = shift + scale * boxes[..., :2], scale.abs() * boxes[..., 2:]
    first, last = torch.minimum(shift, shift + scale), torch.maximum(shift, shift + scale)  # the image's edges
    least = torch.where(first < 0, 0.0, -torch.inf)
    most = torch.where(last > 1, 1.0, torch.inf)
    low, high = ((centers + sign * sizes / 2).clamp(least, most) for sign in (-1, 1))
    visible = (high - low).prod(-1) / sizes.prod(-1).clamp(min=1e-12)
    return torch.cat([(low + high) / 2, (high - low).clamp(min=1e-3)], -1), visible.clamp(0, 1)
