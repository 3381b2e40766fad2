from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hf_detrkd.data import load_detection_split
from hf_detrkd.data.shapes import SHAPE_CLASSES, ShapesRecords
from hf_detrkd.data.shapes.rendering import render
from hf_detrkd.data.shapes.scenes import Scene


def drawn(scene: Scene) -> np.ndarray:
    return render(scene, np.random.default_rng(0), 128, 128).astype(int)


def changed(one: Scene, other: Scene) -> np.ndarray:
    """Pixels in which two renderings differ by more than rounding."""
    return np.abs(drawn(one) - drawn(other)).max(-1) > 24


@pytest.fixture
def records() -> ShapesRecords:
    return ShapesRecords(60, seed=0, split="train", cache=False)


def test_image_and_boxes_follow_from_seed_split_and_index(records):
    again = ShapesRecords(10, seed=0, split="train")
    np.random.seed(5)
    assert np.array_equal(records.image(3), again.image(3)) and np.array_equal(records[3].boxes, again[3].boxes)
    assert np.array_equal(again.image(3), again.image(3)), "the cache changes nothing"
    for other in (ShapesRecords(10, 1, "train"), ShapesRecords(10, 0, "validation"), ShapesRecords(10, 0, "test")):
        assert not np.array_equal(records.image(3), other.image(3))
    assert not np.array_equal(records.image(3), records.image(4))


def test_boxes_are_tight_to_what_is_drawn(records):
    """Leaving out the front object changes exactly the pixels of its box."""
    seen = set()
    for index in range(len(records)):
        scene = replace(records.scene(index), bars=())
        rows, columns = np.nonzero(changed(scene, replace(scene, shapes=scene.shapes[:-1])))
        drawn = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.subtract(drawn, scene.shapes[-1].box)).max() <= 2.0
        seen.add(SHAPE_CLASSES[scene.shapes[-1].category])
    assert seen == set(SHAPE_CLASSES)


def test_objects_stay_mostly_visible(records):
    overlapped = 0
    for index in range(12):
        scene = records.scene(index)
        for i, shape in enumerate(scene.shapes):
            visible = changed(scene, replace(scene, shapes=scene.shapes[:i] + scene.shapes[i + 1 :])).sum()
            alone = changed(replace(scene, shapes=(shape,), bars=()), replace(scene, shapes=(), bars=())).sum()
            assert visible >= 0.35 * alone, "an object whose color is much like its surroundings' counts less"
            overlapped += visible < 0.95 * alone
    assert overlapped > 3, "nothing overlaps, so nothing was shown"


def test_objects_stand_out_from_the_background(records):
    for index in range(len(records)):
        scene = records.scene(index)
        colors = np.array([shape.color for shape in scene.shapes])
        assert np.abs(colors - scene.background).sum(1).min() >= 140


def test_statistics_are_as_documented(records):
    counts = [len(record.boxes) for record in records]
    sides = np.concatenate([record.boxes[:, 2:] for record in records])
    assert min(counts) == 1 and max(counts) >= 7 and max(counts) <= 8
    assert sides.min() + 1e-6 >= 12 and sides.max() <= 48 + 1e-6
    many = ShapesRecords(300, 0, "train", cache=False)
    assert np.mean([bool(many.scene(i).bars) for i in range(300)]) == pytest.approx(0.4, abs=0.08)
    for record in records:
        assert (record.boxes[:, :2] >= 0).all() and (record.boxes[:, :2] + record.boxes[:, 2:] <= 128).all()


def test_objects_scale_with_the_image():
    record = ShapesRecords(20, 0, "train", image_size=(192, 256))[0]
    assert record.load().size == (256, 192) == (record.width, record.height)
    sides = np.concatenate([r.boxes[:, 2:] for r in ShapesRecords(20, 0, "train", image_size=(192, 256))])
    assert sides.min() >= 18 - 1e-6 and 48 < sides.max() <= 72 + 1e-6


def test_any_size_may_be_asked_for():
    assert len(load_detection_split("shapes", "train")) == 2000
    assert len(load_detection_split("shapes")) == len(load_detection_split("shapes", "validation")) == 300
    more = load_detection_split("shapes", "train", max_samples=5000)
    assert len(more) == 5000 and np.array_equal(more.records[1].boxes, ShapesRecords(3, 0, "train")[1].boxes)


def test_large_sets_are_not_kept_in_memory():
    records = ShapesRecords(10**6, 0, "train")
    records.image(999_999)
    assert not records.cache and not records._images
    with pytest.raises(IndexError, match="outside a split of 1000000 images"):
        records[10**6]
