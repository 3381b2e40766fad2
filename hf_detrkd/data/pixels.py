"""Pixels as floats: at once, or where they are used, so that bytes travel between processes and to the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_float(pixels: Tensor, mean_std: Tensor | None = None) -> Tensor:
    """Floats of 8-bit pixels.

    Args:
        pixels (`torch.ByteTensor` of shape `(..., 3, height, width)`)
        mean_std (`torch.Tensor` of shape `(2, 3, 1, 1)`, *optional*): to normalise by, per channel, of [0, 1].
    """
    values = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return values if mean_std is None else values.sub_(mean_std[0]).div_(mean_std[1])


def normalized(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of [`DetectionCollator`] with images as normalised floats, which are zeros on padding.

    Args:
        batch (`dict`): if it has `normalization`, `mean_std` of [`to_float`], its images are bytes; else it is
            returned as it is.
    """
    if "normalization" not in batch:
        return batch
    batch = dict(batch)
    mean_std = batch.pop("normalization").float()  # DeepSpeed rounds what comes to the device
    for view in ("", "teacher_"):
        if f"{view}pixel_values" in batch:
            values = to_float(batch[f"{view}pixel_values"], mean_std)
            mask = batch.get(f"{view}pixel_mask")
            batch[f"{view}pixel_values"] = values if mask is None else values.mul_(mask[:, None])
    return batch
