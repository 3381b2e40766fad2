"""Collates images into batches, with padding if they differ in size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


PREFIX = "answers/"
"""What the names of a teacher's stored answers begin with in a batch."""


class DetectionCollator:
    """Collates items of a [`DetectionDataset`] into a batch.

    Items with a `pixel_mask` are padded with zeros at the right and bottom to the largest of the batch; boxes stay
    relative to the image. Items without one must have the same size.

    Returns:
        `dict`: `pixel_values` (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`), `pixel_mask`
        (`torch.LongTensor` of shape `(batch_size, height, width)`, 1 on the image and 0 on padding) if the items have
        one, the same with the prefix `teacher_` if the teacher's image size differs, and `labels`
        (`list[dict[str, torch.Tensor]]`); with bytes for pixels `normalization`, see [`normalized`]; with
        views also `view` (`int`), and stored answers by the names `answers/...`.

    Raises:
        `ValueError`: if images without a `pixel_mask` differ in size, or the views of images differ.
    """

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = _images(items, "") | {"labels": [item["labels"] for item in items]}
        if "normalization" in items[0]:
            batch["normalization"] = items[0]["normalization"]
        if "view" in items[0]:
            batch |= _answers(items)
        return batch | (_images(items, "teacher_") if "teacher_pixel_values" in items[0] else {})


def _answers(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The view of the images and the stored answers to it; answers per box are padded with zeros to the longest."""
    views = sorted({item["view"] for item in items})
    if len(views) > 1:
        raise ValueError(f"The images of a batch must have the same view, but this batch has the views {views}.")
    rows = [item.get("answers", {}) for item in items]
    columns = {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in rows[0]}
    for name, values in columns.items():
        if not values.shape[1]:  # no image has a box: a decoder is then asked one row of padding
            columns[name] = values.new_zeros(len(values), 1, *values.shape[2:])
    return {"view": views[0]} | {f"{PREFIX}{name}": values for name, values in columns.items()}


def _images(items: Sequence[dict[str, Any]], view: str) -> dict[str, Any]:
    images, mask = [item[f"{view}pixel_values"] for item in items], f"{view}pixel_mask"
    masks = {mask: _stack_padded([item[mask] for item in items])} if all(mask in item for item in items) else {}
    sizes = sorted({tuple(image.shape[-2:]) for image in images})
    if not masks and len(sizes) > 1:
        raise ValueError(
            f"Images without a `pixel_mask` must have the same size, but this batch has {sizes}: resize to a "
            "fixed height and width, or by the shortest edge, which adds the mask."
        )
    return {f"{view}pixel_values": _stack_padded(images)} | masks


def _stack_padded(tensors: list[Tensor]) -> Tensor:
    """Stacks `(..., height, width)` tensors, zero-padded to the largest height and width. Bytes stay in the order of
    image files, channels last: to put them into another costs a third of reading an image."""
    height = max(tensor.shape[-2] for tensor in tensors)
    width = max(tensor.shape[-1] for tensor in tensors)
    shape, dtype = (len(tensors), *tensors[0].shape[:-2], height, width), tensors[0].dtype
    order = torch.channels_last if dtype == torch.uint8 else torch.contiguous_format
    batch = torch.empty(shape, dtype=dtype, memory_format=order).zero_()
    for canvas, tensor in zip(batch, tensors, strict=True):
        canvas[..., : tensor.shape[-2], : tensor.shape[-1]] = tensor
    return batch
