"""The same images in every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_detrkd.data import DatasetError, load_detection_split, load_detection_splits
from tests.data.layouts.writers import WHOLE, WRITERS, dump, write_voc, write_yolo


def seen(data: Any) -> list[tuple]:
    """What a layout has to keep of every image, by file name."""
    rows = []
    for record in data.records:
        pixels = np.asarray(record.load().convert("RGB"))
        boxes = [(data.classes[c], *np.round(b, 4)) for b, c in zip(record.boxes, record.categories, strict=True)]
        rows.append((pixels.shape, int(pixels.sum()), sorted(boxes)))
    return sorted(rows)


def assert_same(found: Any, wanted: Any) -> None:
    assert [row[:2] for row in seen(found)] == [row[:2] for row in seen(wanted)]
    for one, other in zip(seen(found), seen(wanted), strict=True):
        assert [box[0] for box in one[2]] == [box[0] for box in other[2]]
        np.testing.assert_allclose([b[1:] for b in one[2]], [b[1:] for b in other[2]], atol=2e-3)


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_gives_the_same_records(layout: str, splits: dict[str, Any], tmp_path: Path) -> None:
    WRITERS[layout](splits, tmp_path / "data")
    loaded = load_detection_splits(tmp_path / "data")
    assert loaded.train.classes == ["ant", "cat", "zebra"]
    assert_same(loaded.train, splits["train"])
    assert_same(loaded.eval, splits["val"])


@pytest.mark.parametrize("layout", WRITERS)
def test_an_image_that_vanished_can_be_left_out(layout: str, splits: dict[str, Any], tmp_path: Path) -> None:
    WRITERS[layout](splits, tmp_path / "data")
    whole = load_detection_splits(tmp_path / "data").train
    pictures = seen(whole)
    next((tmp_path / "data").rglob("*train*.png")).unlink()
    if "yolo" not in layout.lower():  # there, the images of the folder are the data set
        with pytest.raises(DatasetError, match=r"has 1 problem to correct .*(does not exist|there is no image)"):
            load_detection_splits(tmp_path / "data")
    kept = load_detection_splits(tmp_path / "data", skip_unreadable_images=True).train
    assert len(kept) == len(pictures) - 1 and all(picture in pictures for picture in seen(kept))


@pytest.mark.parametrize("layout", WRITERS)
def test_real_images_in_every_layout(layout: str, real_data: Callable[[str], Path], tmp_path: Path) -> None:
    original = load_detection_splits(real_data("bccd"), max_train_samples=6, max_eval_samples=3)
    WRITERS[layout]({"train": original.train, "val": original.eval}, tmp_path / "data")
    loaded = load_detection_splits(tmp_path / "data")
    assert sorted(loaded.train.classes) == sorted(original.train.classes)
    assert_same(loaded.train, original.train)
    assert_same(loaded.eval, original.eval)


@pytest.mark.parametrize("layout", WHOLE)
def test_a_layout_without_splits_is_split_at_random(layout: str, splits: dict[str, Any], tmp_path: Path) -> None:
    WHOLE[layout](splits, tmp_path / "data")
    loaded = load_detection_splits(tmp_path / "data")
    assert (len(loaded.train), len(loaded.eval)) == (6, 1)
    assert sorted(seen(loaded.train) + seen(loaded.eval)) == seen(splits["train"])
    again = load_detection_splits(tmp_path / "data")
    assert seen(again.eval) == seen(loaded.eval)


def test_coco_files_anywhere_are_named(splits: dict[str, Any], tmp_path: Path) -> None:
    WRITERS["COCO"](splits, tmp_path / "data")
    files = {name: tmp_path / f"{name}.json" for name in ("train", "val")}
    for name, file in files.items():
        (tmp_path / "data" / "annotations" / f"instances_{name}.json").rename(file)
    loaded = load_detection_splits(tmp_path / "data", annotations=files)
    assert_same(loaded.train, splits["train"])
    assert_same(load_detection_split(tmp_path / "data", annotations=files), splits["val"])


def test_yolo_s_other_forms(splits: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_yolo(splits, root)
    (root / "data.yaml").rename(tmp_path / "elsewhere.yaml")
    (root / "classes.txt").write_text("ant\ncat\nzebra\n")
    assert_same(load_detection_splits(root).train, splits["train"])  # without data.yaml
    text = "path: data\nnames: [ant, cat, zebra]\ntrain: [images/train]\nval: list.txt\n"
    (tmp_path / "elsewhere.yaml").write_text(text)
    (root / "list.txt").write_text("\n".join(f"./images/val/val_{i}.png" for i in range(4)))
    assert_same(load_detection_splits(tmp_path / "elsewhere.yaml").eval, splits["val"])  # by the file, with a list


def test_a_polygon_becomes_its_box_and_an_image_without_text_has_no_object(
    splits: dict[str, Any], tmp_path: Path
) -> None:
    write_yolo(splits, tmp_path / "data")
    file = tmp_path / "data" / "labels" / "train" / "train_0.txt"
    file.write_text("2 0.1 0.2 0.5 0.1 0.4 0.6\n")
    file.with_name("train_1.txt").unlink()
    records = load_detection_split(tmp_path / "data", "train").records
    np.testing.assert_allclose(records[0].boxes, [[4, 3, 16, 15]], atol=1e-6)
    assert records[0].categories.tolist() == [2] and len(records[1].boxes) == 0


def test_difficult_objects_of_voc_are_ignored(splits: dict[str, Any], tmp_path: Path) -> None:
    write_voc(splits, tmp_path / "data")
    file = tmp_path / "data" / "Annotations" / "train_1.xml"
    file.write_text(file.read_text().replace("<difficult>0", "<difficult>1"))
    records = load_detection_split(tmp_path / "data", "train").records
    assert records[1].iscrowd.tolist() == [True] and not records[2].iscrowd.any()


@pytest.mark.parametrize(
    "encode",
    [lambda text: b"\xef\xbb\xbf" + text.encode(), lambda text: text.encode("utf-16")],
    ids=["byte order mark", "UTF-16"],
)
def test_files_of_windows_are_read(encode: Any, splits: dict[str, Any], tmp_path: Path) -> None:
    for number, name in enumerate(("COCO", "YOLO")):
        root = tmp_path / str(number)
        WRITERS[name](splits, root)
        for file in [*root.rglob("*.json"), *root.rglob("*.txt"), *root.rglob("*.yaml")]:
            file.write_bytes(encode(file.read_text()))
        assert_same(load_detection_splits(root).train, splits["train"])


def test_numbers_that_no_double_holds_are_named(splits: dict[str, Any], tmp_path: Path) -> None:
    WRITERS["COCO"](splits, tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][0] = 10**400
    content["annotations"][1]["area"] = 10**400
    dump(content, file)
    with pytest.raises(DatasetError, match=r"2 problems .* which is not finite; .* is not a finite number"):
        load_detection_split(tmp_path / "data", "train")
