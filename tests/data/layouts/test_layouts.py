"""The same images in every layout, and malformed files of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_detrkd.data import DatasetError, DetectionDataset, load_detection_split, load_detection_splits
from hf_detrkd.data.records import ImageRecord
from tests.data.layouts.writers import WHOLE, WRITERS, dump, write_labels, write_voc, write_yolo


class Files:
    """Two splits of generated image files with boxes, in the place of a data set."""

    def __init__(self, root: Path, counts: dict[str, int]):
        self.root, self.counts = root, counts

    def splits(self) -> dict[str, Any]:
        found = {}
        generator = np.random.default_rng(0)
        for split, count in self.counts.items():
            records = []
            for number in range(count):
                width, height = 40 + 2 * number, 30 + number
                file = self.root / split / f"{split}_{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file)
                boxes = generator.integers(1, 14, (number % 3, 4)).astype(float)
                records.append(
                    ImageRecord(
                        number,
                        str(file),
                        lambda file=file: Image.open(file),
                        boxes,
                        generator.integers(0, 3, len(boxes)),
                        boxes[:, 2] * boxes[:, 3],
                        np.zeros(len(boxes), bool),
                        width,
                        height,
                    )
                )
            found[split] = dataset_of(records)
        return found


def dataset_of(records: list[ImageRecord]) -> DetectionDataset:
    return DetectionDataset(records, ["ant", "cat", "zebra"])


@pytest.fixture
def splits(tmp_path: Path) -> dict[str, Any]:
    return Files(tmp_path / "plain", {"train": 7, "val": 4}).splits()


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


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 331\n"
BAD_YOLO = {
    "0 0.5 0.5 0.2": "train_1.txt, line 1: an object must be a class and 4 numbers, or the corners of a polygon",
    "0 0.5 0.5 0.2 0.1 0.9": "got 6 fields",
    "0 0.5 0.5 0.2 0.1 0.9 0.1 0.2": "got 8 fields",
    "3 0.5 0.5 0.2 0.1": "line 1: the class '3' is not one of 0 to 2",
    "-1 0.5 0.5 0.2 0.1": "the class '-1' is not one of 0 to 2",
    "1.5 0.5 0.5 0.2 0.1": "the class '1.5' is not one of 0 to 2",
    "cat 0.5 0.5 0.2 0.1": "'cat' is not a finite number",
    "0 0.5 nan 0.2 0.1": "'nan' is not a finite number",
    "0 0.5 inf 0.2 0.1": "'inf' is not a finite number",
    "0 20 10 8 6": "must be relative to the image, in [0, 1]",
    "0 1 1 9 9 1 9": "must be relative to the image, in [0, 1]",
    "\n0 0.5 0.5 0.2 0.1\n0 0,5 0.5 0.2 0.1": "line 3: the number '0,5' is not a finite number",
    POINTER: "is a Git LFS pointer",
    b"\xff\xfe0": "is not UTF-8 text",
}


@pytest.mark.parametrize("content", BAD_YOLO)
def test_malformed_label_files_are_named(content: Any, splits: dict[str, Any], tmp_path: Path) -> None:
    write_yolo(splits, tmp_path / "data")
    file = tmp_path / "data" / "labels" / "train" / "train_1.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DatasetError) as error:
        load_detection_split(tmp_path / "data", "train")
    assert BAD_YOLO[content] in str(error.value) and "1 problem to correct" in str(error.value)


BAD_CONFIGS = {
    "names: [ant]\n": "must be a mapping with `names` and the splits train and val",
    "train: images/train\nval: images/val\n": "`names` of",
    "names: ant\ntrain: images/train\n": "must be the list of class names, got 'ant'",
    "names: {0: ant, 2: cat}\ntrain: images/train\n": "must be numbered from 0 without gaps, got [0, 2]",
    "names: [ant, cat, zebra]\ntrain: images/nowhere\n": "has the split train in images/nowhere, but there is no such",
    "names: [ant\ntrain: x\n": "line 2 is not YAML",
    "names:\n\t- ant\n": "line 2 is not YAML: it has a tab, where YAML wants spaces",
    "- 1\n": "must be a mapping",
    POINTER: "is a Git LFS pointer",
}


@pytest.mark.parametrize("content", BAD_CONFIGS)
def test_malformed_configs_are_named(content: str, splits: dict[str, Any], tmp_path: Path) -> None:
    write_yolo(splits, tmp_path / "data")
    (tmp_path / "data" / "data.yaml").write_text(content)
    with pytest.raises(DatasetError) as error:
        load_detection_split(tmp_path / "data", "train")
    assert "data.yaml" in str(error.value) and BAD_CONFIGS[content] in str(error.value)


def test_images_without_any_label_file_are_no_success(splits: dict[str, Any], tmp_path: Path) -> None:
    write_labels(splits["train"], tmp_path / "data" / "images" / "train", tmp_path / "other")
    (tmp_path / "data" / "labels" / "train").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"has 7 images, but no label file, such as .*labels/train/train_0\.txt"):
        load_detection_split(tmp_path / "data", "train")


BOX = "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>"
BAD_XML = {
    "<annotation>": "train_1.xml is not XML",
    "": "train_1.xml is not XML",
    POINTER: "is a Git LFS pointer",
    f"<a>{BOX.replace('<name>cat</name>', '')}</a>": "object 1 of train_1.xml has no name",
    f"<a>{BOX}{BOX.replace('cat', ' ')}</a>": "object 2 of train_1.xml has no name",
    f"<a>{BOX.replace('<xmin>1</xmin>', '')}</a>": "object 1 of train_1.xml has the xmin None, which must be a number",
    f"<a>{BOX.replace('>2<', '>two<')}</a>": "has the ymin 'two', which must be a number",
    f"<a>{BOX.replace('>9<', '>nan<')}</a>": "has the xmax 'nan', which must be a number",
    f"<a>{BOX.replace('>8<', '>1e999<')}</a>": "has the ymax '1e999', which must be a number",
    "<a><object><name>cat</name></object></a>": "has the xmin None",
}


@pytest.mark.parametrize("content", BAD_XML)
def test_malformed_xml_files_are_named(content: str, splits: dict[str, Any], tmp_path: Path) -> None:
    write_voc(splits, tmp_path / "data")
    (tmp_path / "data" / "Annotations" / "train_1.xml").write_text(content)
    with pytest.raises(DatasetError) as error:
        load_detection_split(tmp_path / "data", "train")
    assert BAD_XML[content] in str(error.value) and "1 problem to correct" in str(error.value)
    assert len(load_detection_split(tmp_path / "data", "val")) == 4  # the other split is sound


def test_missing_files_of_voc_are_named(splits: dict[str, Any], tmp_path: Path) -> None:
    write_voc(splits, tmp_path / "data")
    (tmp_path / "data" / "Annotations" / "train_1.xml").unlink()
    (tmp_path / "data" / "JPEGImages" / "train_2.png").unlink()
    with pytest.raises(DatasetError) as error:
        load_detection_split(tmp_path / "data", "train")
    for words in (
        "2 problems",
        "the annotation file train_1.xml does not exist",
        "there is no image train_2, with any",
    ):
        assert words in str(error.value)


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
