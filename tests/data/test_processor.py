"""Images of the training are those of the image processor, to the pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DetrImageProcessor, RTDetrImageProcessor, YolosImageProcessor

from hf_detrkd.data import DetectionTransform, ImageRecord
from hf_detrkd.data.image_size import ImageSize
from hf_detrkd.data.processor import size_of


def sized(processor: Any, height: int, width: int) -> tuple[int, ...]:
    """The size that a processor gives an image."""
    found = processor(images=Image.new("RGB", (width, height)), return_tensors="pt", do_pad=False)
    return tuple(found["pixel_values"][0].shape[-2:])


@pytest.mark.parametrize(
    "processor",
    [
        DetrImageProcessor(size={"shortest_edge": 80, "longest_edge": 133}),
        DetrImageProcessor(size={"max_height": 96, "max_width": 128}),
        YolosImageProcessor(size={"shortest_edge": 96, "longest_edge": 150}),
        RTDetrImageProcessor(size={"height": 64, "width": 96}),
    ],
    ids=["detr", "maxima", "yolos", "fixed"],
)
def test_sizes_are_those_of_the_processor(processor: Any) -> None:
    sides = np.random.default_rng(0).integers(60, 400, (150, 2)).tolist()
    for height, width in [*sides, (80, 80), (96, 96), (133, 80), (80, 133), (96, 150), (640, 480), (480, 640)]:
        assert size_of(processor).of(height, width) == sized(processor, height, width), (height, width)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"do_normalize": False},
        {"do_normalize": False, "rescale_factor": 1 / 127.5},
        {"do_normalize": False, "do_rescale": False},
    ],
)
def test_pixels_are_those_of_the_processor(options: dict[str, Any]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    none = np.zeros((0, 4))
    record = ImageRecord(
        1, "it", lambda: picture, none, np.zeros(0, int), np.zeros(0), np.zeros(0, bool), width=64, height=48
    )
    processor = DetrImageProcessor(size={"height": 48, "width": 64}, do_pad=False, **options)
    theirs = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    ours = DetectionTransform.for_processor(processor)(picture, record, 0)["pixel_values"]
    torch.testing.assert_close(ours, theirs.float(), atol=2e-3, rtol=1e-4)


def test_a_processor_without_a_size_is_refused_by_name() -> None:
    processor = DetrImageProcessor(do_resize=False)
    with pytest.raises(ValueError, match=r"do_resize is false.* set --image_size"):
        DetectionTransform.for_processor(processor)
    assert DetectionTransform.for_processor(processor, size=(32, 48)).size == ImageSize(32, 48)
    with pytest.raises(
        ValueError,
        match=r"max_height and max_width, all positive whole numbers up to 16384, got \{'longest_edge': 3\}",
    ):
        ImageSize.parse({"longest_edge": 3})
