from __future__ import annotations

import pytest
import torch
from PIL import Image

from hf_detrkd.data import DetectionCollator, DetectionDataset, DetectionTransform


@pytest.fixture
def dataset(record) -> DetectionDataset:
    """A wide and a tall white image with the same relative box."""
    wide, tall = Image.new("RGB", (80, 40), (255, 255, 255)), Image.new("RGB", (30, 60), (255, 255, 255))
    return DetectionDataset([record(wide, [[20, 10, 40, 20]]), record(tall, [[7.5, 15, 15, 30]], image_id=2)], "ab")


def test_fixed_size_needs_no_mask(dataset):
    dataset = dataset.with_transform(DetectionTransform((32, 48)))
    batch = DetectionCollator()([dataset[0], dataset[1]])
    assert set(batch) == {"pixel_values", "labels"} and batch["pixel_values"].shape == (2, 3, 32, 48)
    assert [int(label["image_id"]) for label in batch["labels"]] == [11, 2]


def test_padding_changes_neither_boxes_nor_pixels(dataset):
    """Zeros after normalisation on the right and at the bottom; boxes stay those of the image."""
    dataset = dataset.with_transform(DetectionTransform({"shortest_edge": 20}, [0.5] * 3, [0.25] * 3))
    items = [dataset[0], dataset[1]]
    batch = DetectionCollator()(items)
    assert batch["pixel_values"].shape == (2, 3, 40, 40) and batch["pixel_mask"].shape == (2, 40, 40)
    assert batch["pixel_mask"].dtype == torch.int64
    for i, (height, width) in enumerate([(20, 40), (40, 20)]):
        assert torch.equal(batch["pixel_values"][i, :, :height, :width], items[i]["pixel_values"])
        assert batch["pixel_mask"][i, :height, :width].all() and batch["pixel_mask"][i].sum() == height * width
        assert (batch["pixel_values"][i] * (1 - batch["pixel_mask"][i])).abs().sum() == 0
        assert torch.allclose(batch["labels"][i]["boxes"], torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
        assert batch["labels"][i]["size"].tolist() == [height, width]


def test_images_of_several_sizes_need_a_mask(dataset):
    items = [dataset.with_transform(DetectionTransform(size))[0] for size in ((32, 48), (32, 40))]
    with pytest.raises(ValueError, match=r"must have the same size, but this batch has \[\(32, 40\), \(32, 48\)\]"):
        DetectionCollator()(items)
