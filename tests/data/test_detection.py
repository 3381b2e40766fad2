from __future__ import annotations

import pickle

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_detrkd.data import (
    AugmentationConfig,
    DetectionCollator,
    DetectionDataset,
    DetectionTransform,
    load_detection_split,
)


@pytest.fixture
def dataset() -> DetectionDataset:
    shapes = load_detection_split("shapes", "train", max_samples=12, shapes_size=(48, 48))
    return shapes.with_transform(DetectionTransform((40, 40), augmentation=AugmentationConfig()), seed=4)


def assert_equal(one: dict, other: dict) -> None:
    assert torch.equal(one["pixel_values"], other["pixel_values"])
    assert one["labels"].keys() == other["labels"].keys()
    assert all(torch.equal(one["labels"][key], other["labels"][key]) for key in one["labels"])


def test_items_follow_from_seed_epoch_and_index(dataset):
    first = dataset[5]
    dataset.set_epoch(1)
    other_epoch = dataset[5]
    assert not torch.equal(first["pixel_values"], other_epoch["pixel_values"])
    dataset.set_epoch(0)
    torch.manual_seed(1)
    assert_equal(dataset[5], first)
    assert_equal(dataset[-7], first)
    other_seed = dataset.with_transform(dataset.transform, seed=5)
    assert not torch.equal(first["pixel_values"], other_seed[5]["pixel_values"])


def test_workers_that_live_through_epochs_follow_the_epoch(dataset):
    loader = DataLoader(dataset, 4, num_workers=2, persistent_workers=True, collate_fn=DetectionCollator())
    epochs = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        images = torch.cat([batch["pixel_values"] for batch in loader])
        assert torch.equal(images, torch.stack([dataset[i]["pixel_values"] for i in range(12)]))
        epochs.append(images)
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_a_pickled_dataset_shows_the_same(dataset):
    """What a spawned worker gets."""
    dataset.set_epoch(2)
    assert_equal(pickle.loads(pickle.dumps(dataset))[3], dataset[3])


def test_epochs_of_two_views_are_their_own(dataset):
    other = dataset.with_transform(dataset.transform, seed=4)
    other.set_epoch(9)
    assert_equal(dataset[0], dataset.with_transform(dataset.transform, seed=4)[0])
    assert not torch.equal(other[0]["pixel_values"], dataset[0]["pixel_values"])


def test_select_keeps_order_and_classes(dataset):
    selected = dataset.select([7, 2])
    assert [int(selected[i]["labels"]["image_id"]) for i in range(2)] == [7, 2]
    assert len(selected) == 2 and selected.classes == dataset.classes
    assert [record.image_id for record in selected.select([1]).records] == [2]


def test_coco_ground_truth_gives_original_ids(record):
    image = Image.new("RGB", (40, 20))
    records = [
        record(image, [[1, 2, 3, 4], [0, 0, 40, 20]], crowd=[False, True], image_id=70),
        record(image, [], image_id=5),
    ]
    truth = DetectionDataset(records, ["ant", "cat"], [4, 90]).coco_ground_truth()
    assert truth["categories"] == [{"id": 4, "name": "ant"}, {"id": 90, "name": "cat"}]
    assert [(entry["id"], entry["width"], entry["height"]) for entry in truth["images"]] == [(70, 40, 20), (5, 40, 20)]
    assert truth["annotations"] == [
        {"id": 1, "image_id": 70, "category_id": 4, "bbox": [1, 2, 3, 4], "area": 100.0, "iscrowd": 0},
        {"id": 2, "image_id": 70, "category_id": 90, "bbox": [0, 0, 40, 20], "area": 101.0, "iscrowd": 1},
    ]


def test_ids_are_indices_where_the_source_has_none(dataset):
    assert dataset.category_ids == list(range(6)) and len(dataset.classes) == 6


def test_without_a_transform_an_item_says_what_to_do():
    with pytest.raises(ValueError, match=r"call `with_transform\(DetectionTransform\(...\)\)` first"):
        load_detection_split("shapes")[0]


def test_index_outside_is_refused(dataset):
    for index in (12, -13):
        with pytest.raises(IndexError, match="outside a data set of 12 images"):
            dataset[index]
