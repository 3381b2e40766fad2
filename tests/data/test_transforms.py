from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert
from torchvision.transforms import v2

from hf_detrkd.data import AugmentationConfig, DetectionCollator, DetectionTransform
from hf_detrkd.data.augmentation import DetrCrop, item_seed, seeded
from hf_detrkd.data.pixels import normalized


ALL = AugmentationConfig(scale_jitter=1.0, iou_crop=0.5, photometric=1.0)
GEOMETRY = {
    "flip": AugmentationConfig(horizontal_flip=1.0, scale_jitter=0.0, iou_crop=0.0, photometric=0.0),
    "zoom": AugmentationConfig(horizontal_flip=0.0, scale_jitter=1.0, iou_crop=0.0, photometric=0.0),
    "crop": AugmentationConfig(horizontal_flip=0.0, scale_jitter=0.0, iou_crop=1.0, photometric=0.0),
    "detr's crop": AugmentationConfig(
        horizontal_flip=0.0, scale_jitter=0.0, iou_crop=0.0, photometric=0.0, detr_crop=1.0
    ),
    "together": AugmentationConfig(photometric=0.0),
}


@pytest.fixture
def bright(record):
    """A bright rectangle on black, 140x100."""
    pixels = np.zeros((100, 140, 3), np.uint8)
    pixels[20:60, 80:110] = 255
    return record(Image.fromarray(pixels), [[80, 20, 30, 40]])


@pytest.fixture
def noise(record):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    return record(Image.fromarray(pixels), [[5, 5, 60, 40], [50, 30, 70, 60], [100, 2, 8, 8], [0, 70, 20, 20]])


def bounds(mask: torch.Tensor) -> torch.Tensor:
    """(x0, y0, x1, y1) of what is true, in [0, 1]."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    corners = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return corners / torch.tensor(mask.shape[::-1]).repeat(2)


@pytest.mark.parametrize("augmentation", GEOMETRY.values(), ids=GEOMETRY)
@pytest.mark.parametrize("size", [(64, 96), {"shortest_edge": 80, "longest_edge": 100}], ids=["fixed", "aspect"])
def test_boxes_follow_the_pixels(bright, augmentation, size):
    transform = DetectionTransform(size, augmentation=augmentation)
    found, places = 0, set()
    for seed in range(40):
        item = transform(bright.load(), bright, seed)
        if len(item["labels"]["boxes"]) == 0:
            continue
        found += 1
        mask = item["pixel_values"].mean(0) > 0.5
        expected = box_convert(item["labels"]["boxes"][0], "cxcywh", "xyxy")
        tolerance = 1.6 / min(mask.shape)
        assert torch.allclose(bounds(mask), expected, atol=tolerance), f"seed {seed}"
        places.add(tuple(expected.mul(50).round().tolist()))
    assert found > 25
    assert len(places) > 10 or augmentation is GEOMETRY["flip"], "nothing moved"


def test_flip_mirrors(bright):
    plain = DetectionTransform((100, 140))(bright.load(), bright, 0)
    mirrored = DetectionTransform((100, 140), augmentation=GEOMETRY["flip"])(bright.load(), bright, 0)
    assert torch.equal(mirrored["pixel_values"], plain["pixel_values"].flip(-1))
    moved = plain["labels"]["boxes"] * torch.tensor([-1, 1, 1, 1]) + torch.tensor([1, 0, 0, 0])
    assert torch.allclose(mirrored["labels"]["boxes"], moved, atol=1e-6)


def test_same_seed_same_tensor_whatever_the_global_state(noise):
    transform = DetectionTransform((64, 64), augmentation=ALL)
    first = transform(noise.load(), noise, 12)
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    again = transform(noise.load(), noise, 12)
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert all(torch.equal(first["labels"][key], again["labels"][key]) for key in first["labels"])
    assert not torch.equal(first["pixel_values"], transform(noise.load(), noise, 13)["pixel_values"])


def test_global_generators_are_left_untouched(noise, monkeypatch):
    """Not even seeded and put back where that would reach an accelerator's generator."""

    def refuse(seed):
        raise AssertionError("torch.manual_seed seeds the accelerators")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    DetectionTransform((64, 64), augmentation=ALL)(noise.load(), noise, 12)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])


def test_generator_is_put_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded(3):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(before, torch.get_rng_state())


def test_item_seeds_do_not_collide():
    seeds = {item_seed(s, e, i) for s in range(5) for e in range(20) for i in range(100)}
    assert len(seeds) == 5 * 20 * 100
    assert item_seed(1, 2, 3) == item_seed(1, 2, 3) != item_seed(3, 2, 1)


def test_labels_stay_together_when_boxes_vanish(noise):
    """Class and area tell which box each row came from."""
    transform = DetectionTransform((64, 64), augmentation=GEOMETRY["together"])
    sizes = set()
    for seed in range(40):
        labels = transform(noise.load(), noise, seed)["labels"]
        count = len(labels["boxes"])
        sizes.add(count)
        assert labels["area"].tolist() == (labels["class_labels"] + 100.0).tolist()
        assert labels["iscrowd"].tolist() == [0] * count
        corners = box_convert(labels["boxes"], "cxcywh", "xyxy")
        assert (corners >= -1e-6).all() and (corners <= 1 + 1e-6).all() and (labels["boxes"][:, 2:] > 0).all()
    assert len(sizes) > 1, "no box ever vanished"


def test_boxes_that_are_hardly_left_are_removed(record):
    """A zoom to 2 shows a quarter of the image; the box is the whole image's right half."""
    image = Image.new("RGB", (100, 100))
    one = record(image, [[50, 0, 50, 100]])
    zoom = {"horizontal_flip": 0.0, "iou_crop": 0.0, "photometric": 0.0, "min_scale": 2.0, "max_scale": 2.0}
    counts = {}
    for least in (0.0, 0.3, 1.0):
        augmentation = AugmentationConfig(scale_jitter=1.0, min_visible=least, **zoom)
        transform = DetectionTransform((50, 50), augmentation=augmentation)
        counts[least] = sum(len(transform(image, one, seed)["labels"]["boxes"]) for seed in range(50))
    assert counts[0.0] > counts[0.3] > counts[1.0] == 0


def test_every_box_keeps_its_class(record):
    """Three bars, each of the colour channel that is its class."""
    pixels = np.zeros((60, 90, 3), np.uint8)
    for i in range(3):
        pixels[10 + 15 * i : 20 + 15 * i, 5 + 30 * i : 30 + 30 * i, i] = 255
    bars = record(Image.fromarray(pixels), [[5 + 30 * i, 10 + 15 * i, 25, 10] for i in range(3)])
    transform = DetectionTransform((64, 64), augmentation=GEOMETRY["together"])
    partial = 0
    for seed in range(40):
        item = transform(bars.load(), bars, seed)
        partial += len(item["labels"]["boxes"]) in (1, 2)
        for box, category in zip(item["labels"]["boxes"], item["labels"]["class_labels"], strict=True):
            column, row = (box[:2] * 64).long().tolist()
            assert item["pixel_values"][:, row, column].argmax() == category
    assert partial > 3, "no box ever vanished"


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3)])
def test_images_of_a_few_pixels_survive(record, size):
    image = Image.new("RGB", size)
    tiny = record(image, [[0, 0, *size]])
    for seed in range(10):
        item = DetectionTransform((32, 48), augmentation=ALL)(image, tiny, seed)
        assert item["pixel_values"].shape == (3, 32, 48) and item["pixel_values"].isfinite().all()


def test_image_without_boxes_has_empty_labels_of_the_right_shapes(record):
    image = Image.new("RGB", (40, 30))
    for augmentation in (None, ALL):
        labels = DetectionTransform((32, 32), augmentation=augmentation)(image, record(image, []), 1)["labels"]
        assert labels["boxes"].shape == (0, 4) and labels["boxes"].dtype == torch.float32
        assert labels["class_labels"].shape == (0,) and labels["class_labels"].dtype == torch.int64
        assert labels["area"].shape == labels["iscrowd"].shape == (0,)


def test_values_and_types_of_an_item(record):
    image = Image.new("RGB", (40, 30), (255, 0, 51))
    one = record(image, [[4, 6, 8, 12]])
    item = DetectionTransform((60, 20), [0.5, 0.5, 0.5], [0.5, 0.25, 1.0])(image, one, 0)
    labels = item["labels"]
    assert "pixel_mask" not in item and item["pixel_values"].is_contiguous()
    assert torch.allclose(item["pixel_values"][:, 7, 7], torch.tensor([1.0, -2.0, -0.3]), atol=1e-6)
    assert torch.allclose(labels["boxes"], torch.tensor([[8 / 40, 12 / 30, 8 / 40, 12 / 30]]))
    assert labels["image_id"].tolist() == [11] and labels["area"].tolist() == [100.0]
    assert labels["orig_size"].tolist() == [30, 40] and labels["size"].tolist() == [60, 20]
    dtypes = {key: value.dtype for key, value in labels.items()}
    assert dtypes["image_id"] == dtypes["class_labels"] == dtypes["orig_size"] == dtypes["size"] == torch.int64
    raw = DetectionTransform((30, 40))(image, one, 0)["pixel_values"]
    assert torch.allclose(raw[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"height": 24, "width": 32}, (24, 32)),
        ({"shortest_edge": 30}, (30, 60)),
        ({"shortest_edge": 30, "longest_edge": 40}, (20, 40)),
    ],
)
def test_sizes_of_image_processors(record, size, expected):
    image = Image.new("RGB", (100, 50))
    transform = DetectionTransform(size)
    item = transform(image, record(image, [[0, 0, 50, 50]]), 0)
    assert item["pixel_values"].shape == (3, *expected) and tuple(item["labels"]["size"].tolist()) == expected
    assert transform.pads == ("pixel_mask" in item) == ("shortest_edge" in size)
    assert torch.allclose(item["labels"]["boxes"], torch.tensor([[0.25, 0.5, 0.5, 1.0]]))
    if transform.pads:
        assert item["pixel_mask"].shape == expected and item["pixel_mask"].dtype == torch.int64


def test_crowd_boxes_are_kept_for_evaluation_only(record):
    image = Image.new("RGB", (40, 20))
    mixed = record(image, [[0, 0, 10, 10], [0, 0, 40, 10], [20, 10, 10, 10]], crowd=[False, True, False])
    labels = DetectionTransform((20, 40))(image, mixed, 0)["labels"]
    assert labels["class_labels"].tolist() == [0, 2] and labels["iscrowd"].tolist() == [0, 0]
    assert torch.allclose(labels["boxes"], torch.tensor([[0.125, 0.25, 0.25, 0.5], [0.625, 0.75, 0.25, 0.5]]))
    assert torch.allclose(labels["crowd_boxes"], torch.tensor([[0.5, 0.25, 1.0, 0.5]]))
    assert labels["crowd_labels"].tolist() == [1] and labels["crowd_area"].tolist() == [101.0]
    training = DetectionTransform((20, 40), augmentation=AugmentationConfig.none())(image, mixed, 0)["labels"]
    assert training["class_labels"].tolist() == [0, 2] and not any(key.startswith("crowd") for key in training)
    empty = DetectionTransform((20, 40))(image, record(image, []), 0)["labels"]
    assert empty["crowd_boxes"].shape == (0, 4) and empty["crowd_labels"].shape == (0,)


def test_flip_only_shows_two_views(noise):
    transform = DetectionTransform((90, 120), augmentation=AugmentationConfig.flip_only())
    plain = DetectionTransform((90, 120))(noise.load(), noise, 0)["pixel_values"]
    views = [transform(noise.load(), noise, seed)["pixel_values"] for seed in range(20)]
    flipped = [torch.equal(view, plain.flip(-1)) for view in views]
    assert any(flipped) and not all(flipped)
    assert all(torch.equal(view, plain.flip(-1) if flip else plain) for view, flip in zip(views, flipped, strict=True))


@pytest.mark.parametrize(
    ("size", "message"),
    [({"height": 3}, "must be .height, width."), ({"shortest_edge": 0}, "positive"), ((0, 3), "positive")],
)
def test_wrong_sizes_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        DetectionTransform(size)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="both `image_mean` and `image_std`"):
        DetectionTransform((3, 3), image_mean=[0.5] * 3)
    with pytest.raises(ValueError, match=r"`iou_crop` must lie in \[0, 1\], got 1.5"):
        AugmentationConfig(iou_crop=1.5)
    with pytest.raises(ValueError, match="`min_scale` and `max_scale` must be positive and ordered"):
        AugmentationConfig(min_scale=2.0)


def test_detr_crops_384_to_600_pixels_of_an_image_with_one_of_three_short_sides(record):
    height, width = 300, 500
    image = record(Image.new("RGB", (width, height)), [[0, 0, width, height]])
    config = GEOMETRY["detr's crop"]
    whole = DetectionTransform({"shortest_edge": height}, augmentation=config)
    seen = set()
    for seed in range(300):
        seen.add(tuple(whole(image.load(), image, seed)["labels"]["size"].tolist()))
    crops = {DetrCrop().make_params([torch.zeros(3, height, width)])["width"] for _ in range(400)}
    scales = [short / height for short in (400, 500, 600)]
    assert min(crops) >= 384 / scales[2] - 1 and max(crops) <= 600 / scales[0] + 1
    assert min(crops) < 384 / scales[2] * 1.1 and max(crops) > 600 / scales[0] * 0.95
    assert len(seen) > 30


def test_a_short_side_is_drawn_for_each_image_and_the_long_side_stays_the_limit(record):
    sides, image = [60, 80, 100], record(Image.new("RGB", (200, 100)), [[10, 10, 20, 20]])
    config = AugmentationConfig(horizontal_flip=0, scale_jitter=0, iou_crop=0, photometric=0, short_sides=sides)
    transform = DetectionTransform({"shortest_edge": 100, "longest_edge": 180}, augmentation=config)
    items = [transform(image.load(), image, seed) for seed in range(30)]
    assert {tuple(item["pixel_values"].shape[1:]) for item in items} == {(60, 120), (80, 160), (90, 180)}
    for item in items:
        torch.testing.assert_close(item["labels"]["boxes"][0], torch.tensor([0.1, 0.2, 0.1, 0.2]), atol=1e-3, rtol=0)
        assert item["pixel_mask"].shape == item["pixel_values"].shape[1:]
    again = transform(image.load(), image, 3)["pixel_values"].shape
    assert again == items[3]["pixel_values"].shape
    for size, teacher in (((100, 100), None), ({"shortest_edge": 100}, (50, 50))):
        with pytest.raises(ValueError, match="`short_sides` needs a size with a `shortest_edge`"):
            DetectionTransform(size, augmentation=config, teacher_size=teacher)
    with pytest.raises(ValueError, match="`short_sides` must be numbers of pixels, got \\[0\\]"):
        AugmentationConfig(short_sides=[0])


# --- what the teacher sees -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "photometric"), [(((32, 40), (64, 48)), 0.0), (((320, 400), (640, 480)), 1.0)])
def test_the_teacher_sees_the_same_augmented_image_in_its_own_size(noise, sizes, photometric):
    """Seen by a student of the teacher's size, the seed gives that image: crop, flip and colours are the same."""
    augmentation = AugmentationConfig(scale_jitter=1.0, iou_crop=1.0, horizontal_flip=0.5, photometric=photometric)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)
    both = DetectionTransform(sizes[0], mean, std, augmentation, teacher_size=sizes[1])
    student, teacher = (DetectionTransform(size, mean, std, augmentation) for size in sizes)
    image = noise.load()
    for seed in range(8):
        item = both(image, noise, seed)
        assert torch.equal(item["teacher_pixel_values"], teacher(image, noise, seed)["pixel_values"])
        alone = student(image, noise, seed)
        assert torch.equal(item["pixel_values"], alone["pixel_values"])
        assert torch.equal(item["labels"]["boxes"], alone["labels"]["boxes"])


def test_colours_are_distorted_once_and_on_no_more_pixels_than_the_larger_view_has(noise, monkeypatch):
    transform = DetectionTransform((16, 24), augmentation=AugmentationConfig(photometric=1.0), teacher_size=(32, 40))
    sizes = []
    distort = v2.RandomPhotometricDistort()
    monkeypatch.setattr(transform, "_distort", lambda image: sizes.append(image.size) or distort(image))
    for seed in range(4):
        transform(noise.load(), noise, seed)
    assert sizes == [(40, 32)] * 4


@pytest.mark.parametrize("normalization", [((0.4, 0.5, 0.6), (0.2, 0.2, 0.3)), (None, None)])
@pytest.mark.parametrize("size", [(32, 40), {"shortest_edge": 32}, {"max_height": 20, "max_width": 50}])
def test_bytes_that_are_normalised_later_are_the_same(noise, size, normalization):
    tall = dataclasses.replace(noise, load=lambda: noise.load().resize((30, 90)))
    batches = []
    for normalize in (True, False):
        transform = DetectionTransform(size, *normalization, None, {"shortest_edge": 20}, normalize)
        batch = DetectionCollator()([transform(record.load(), record, 0) for record in (noise, tall)])
        assert batch["pixel_values"].dtype == (torch.float32 if normalize else torch.uint8)
        batches.append(normalized(batch))
    assert batches[0].keys() == batches[1].keys()
    for name in ("pixel_values", "teacher_pixel_values"):
        assert torch.equal(*(batch[name] for batch in batches))


def test_one_size_is_one_tensor(noise):
    item = DetectionTransform((32, 40), teacher_size={"height": 32, "width": 40})(noise.load(), noise, 0)
    assert not any(name.startswith("teacher_") for name in item)


def test_a_teacher_that_keeps_the_aspect_ratio_gets_a_mask(noise):
    item = DetectionTransform((32, 40), teacher_size={"shortest_edge": 20})(noise.load(), noise, 0)
    assert item["teacher_pixel_mask"].shape == item["teacher_pixel_values"].shape[-2:]
    assert "pixel_mask" not in item
    batch = DetectionCollator()([item, item])
    assert batch["teacher_pixel_values"].shape[0] == batch["teacher_pixel_mask"].shape[0] == 2
    assert "pixel_mask" not in batch
