"""Data sets that would train to nothing are refused before a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_detrkd.data import DatasetError, load_detection_splits
from hf_detrkd.data.faults import SAMPLE, check_boxes, check_images, nothing_to_learn
from hf_detrkd.data.images import allow_pixels, read_image


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes two splits of four images with the given boxes, and crowd flags."""

    def write(train: list[list[float]], val: list[list[float]] | None = None, crowd: int = 0) -> Path:
        for split, boxes in (("train", train), ("val", train if val is None else val)):
            (tmp_path / split).mkdir(exist_ok=True)
            for number in range(4):
                Image.new("RGB", (64, 48)).save(tmp_path / split / f"{number}.png")
            images = [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(4)]
            annotations = [
                {"id": i + 1, "image_id": i % 4, "category_id": 1, "bbox": box, "iscrowd": crowd}
                for i, box in enumerate(boxes)
            ]
            content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
            (tmp_path / "annotations").mkdir(exist_ok=True)
            (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        return tmp_path

    return write


def checked(folder: Path) -> None:
    splits = load_detection_splits(folder)
    check_boxes(splits.train, splits.eval)


BOXES = [[8.0, 8.0, 20.0, 16.0], [4.0, 6.0, 10.0, 12.0]]


def test_sound_boxes_pass(folder: Callable[..., Path]) -> None:
    checked(folder(BOXES))


@pytest.mark.parametrize(
    ("train", "crowd", "words"),
    [
        ([], 0, "cannot be trained on: none of the 4 images has a box: are these the right annotations"),
        (BOXES, 1, r"all 2 boxes are crowd regions \(iscrowd is 1\), which are not trained on"),
        (
            [[30, 20, 60, 45]] * 3,
            0,
            "look wrong: 3 of 3 boxes .* extend beyond their image: they look like x_min, y_min",
        ),
        ([[0.1, 0.2, 0.3, 0.4]] * 3, 0, "look wrong: no coordinate is above 0.6, so the boxes look normalised"),
    ],
)
def test_what_cannot_be_trained_on_is_said(folder: Callable[..., Path], train: Any, crowd: int, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        checked(folder(train, crowd=crowd))


def test_an_evaluation_set_without_boxes_is_a_warning(
    folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    checked(folder(BOXES, []))
    assert "No evaluation image has a box: every mAP will be -1." in caplog.text


def test_relative_boxes_are_suspected_when_they_are_loaded(
    folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_detection_splits(folder([[0.1, 0.2, 0.3, 0.4]]))
    assert "no coordinate is above 0.6: are the boxes relative to the image?" in caplog.text


def test_images_are_read_before_the_run(folder: Callable[..., Path]) -> None:
    root = folder(BOXES)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown on its side
    Image.new("RGB", (64, 48)).save(root / "train" / "2.png", exif=exif)
    (root / "train" / "3.png").write_bytes(b"no image")
    data = load_detection_splits(root).train
    check_images(data, "training images", "none")
    for mode in ("all", "sample"):
        with pytest.raises(
            DatasetError, match=r"4 of 4 images .* 2 problems .* 48x64 pixels after its EXIF .* cannot be read"
        ):
            check_images(data, "training images", mode)


def test_a_sample_is_spread_over_the_images() -> None:
    data = load_detection_splits("shapes", max_train_samples=3 * SAMPLE, shapes_size=(32, 32)).train
    seen: list[int] = []
    whole = data.records

    class Watched:
        def __len__(self) -> int:
            return len(whole)

        def __getitem__(self, index: int) -> Any:
            seen.append(index)
            return whole[index]

    check_images(data.with_records(Watched()), "training images", "sample")
    assert len(seen) == SAMPLE and min(seen) == 0 and max(seen) == 3 * SAMPLE - 1


def test_a_trained_image_is_enough() -> None:
    assert nothing_to_learn(load_detection_splits("shapes", max_train_samples=3, shapes_size=(32, 32)).train) is None


@pytest.mark.parametrize(("bits", "mode"), [(10, "I;16"), (12, "I;16"), (16, "I;16"), (12, "I")])
def test_deep_pictures_keep_their_contrast(tmp_path: Path, bits: int, mode: str) -> None:
    low, high = 2**bits // 8, 2**bits - 1
    deep = np.full((8, 8), low, np.uint16 if mode == "I;16" else np.int32)
    deep[2:5] = high
    Image.fromarray(deep).save(tmp_path / "deep.png")
    shown = np.asarray(read_image(tmp_path / "deep.png", "deep.png"))
    assert (shown.min(), shown.max()) == (32, 255)


def test_the_limit_of_pixels_is_a_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    monkeypatch.setenv("HF_DETRKD_MAX_IMAGE_PIXELS", "")
    Image.new("RGB", (10, 10)).save(tmp_path / "large.png")
    with pytest.raises(DatasetError, match="is too large"):
        read_image(tmp_path / "large.png", "large.png")
    allow_pixels(100)
    assert read_image(tmp_path / "large.png", "large.png").size == (10, 10)


@pytest.mark.parametrize("name", ["image", "annotations"])
def test_pointers_of_git_lfs_are_named(folder: Callable[..., Path], name: str) -> None:
    root = folder(BOXES)
    files = {"image": root / "train" / "1.png", "annotations": root / "annotations" / "instances_train.json"}
    files[name].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n")
    with pytest.raises(DatasetError, match="is a Git LFS pointer and not the file itself: run `git lfs pull`"):
        check_images(load_detection_splits(root).train, "training images", "all")
