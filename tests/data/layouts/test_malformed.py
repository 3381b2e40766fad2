"""Thirty malformed files of every format: each is one error that names the file and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_detrkd.data import DatasetError, load_detection_split
from tests.data.layouts.writers import (
    Splits,
    write_coco,
    write_imagefolder,
    write_label_studio,
    write_labels,
    write_roboflow,
    write_voc,
    write_yolo,
)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 331\n"
DEEP = "[" * 20_000


def refused(write: Callable[[Splits, Path], None], splits: Splits, root: Path, file: str, content: str | bytes) -> str:
    """The message about a data set, one of whose files holds something else."""
    write(splits, root)
    (root / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DatasetError) as error:
        load_detection_split(root, "result" if file == "result.json" else "train")
    assert "\n" not in str(error.value)
    return str(error.value)


FIELDS = "an object must be a class and 4 numbers, or the corners of a polygon, got"
RELATIVE = "must be relative to the image, in [0, 1]"
BAD_YOLO: dict[str | bytes, str] = {
    "0 0.5 0.5 0.2": f"train_1.txt, line 1: {FIELDS} 4 fields",
    "0 0.5 0.5 0.2 0.1 0.9": f"{FIELDS} 6 fields",
    "0 0.5 0.5 0.2 0.1 0.9 0.1 0.2": f"{FIELDS} 8 fields",
    "0,0.5,0.5,0.2,0.1": f"{FIELDS} 1 fields",
    '{"class": 0}': f"{FIELDS} 2 fields",
    "# a comment": f"{FIELDS} 3 fields",
    "\0\0": f"{FIELDS} 1 fields",
    "3 0.5 0.5 0.2 0.1": "line 1: the class '3' is not one of 0 to 2",
    "-1 0.5 0.5 0.2 0.1": "the class '-1' is not one of 0 to 2",
    "1.5 0.5 0.5 0.2 0.1": "the class '1.5' is not one of 0 to 2",
    "1e30 0.5 0.5 0.2 0.1": "the class '1e30' is not one of 0 to 2",
    "cat 0.5 0.5 0.2 0.1": "'cat' is not a finite number",
    "nan 0.5 0.5 0.2 0.1": "'nan' is not a finite number",
    "0x1 0.5 0.5 0.2 0.1": "'0x1' is not a finite number",
    "class x y w h": "'class' is not a finite number",
    "0 0.5 nan 0.2 0.1": "'nan' is not a finite number",
    "0 0.5 inf 0.2 0.1": "'inf' is not a finite number",
    "0 0.5 1e400 0.2 0.1": "'1e400' is not a finite number",
    "0 0.5 0.5 0.2 \0": "is not a finite number",
    "0 0.5 0.5 0.2 0.1;1 0.5 0.5 0.2": f"{FIELDS} 8 fields",
    "0 0.1 0.1 0.2 0.1 0.2 x": "'x' is not a finite number",
    "\n0 0.5 0.5 0.2 0.1\n0 0,5 0.5 0.2 0.1": "line 3: the number '0,5' is not a finite number",
    "0 20 10 8 6": RELATIVE,
    "0 1 1 9 9 1 9": RELATIVE,
    "0 -0.5 0.5 0.2 0.1": RELATIVE,
    "0 0.5 0.5 3 0.1": RELATIVE,
    POINTER: "is a Git LFS pointer",
    b"\xff\xfe0": "is not UTF-8 text",
    b"\x89PNG\r\n\x1a\n": "is not UTF-8 text",
    "0 0.5 0.5 0.2 0.1".encode("utf-16-le"): "is not a finite number",
}


@pytest.mark.parametrize("content", BAD_YOLO)
def test_label_files_of_yolo(content: str | bytes, splits: Splits, tmp_path: Path) -> None:
    message = refused(write_yolo, splits, tmp_path / "data", "labels/train/train_1.txt", content)
    assert BAD_YOLO[content] in message and "train_1.txt" in message and "1 problem to correct" in message


NAMES = "names: [ant, cat, zebra]\n"
MAPPING = "must be a mapping with `names` and the splits train and val"
BAD_CONFIGS: dict[str | bytes, str] = {
    "names: [ant]\n": MAPPING,
    "": MAPPING,
    "42": MAPPING,
    "- 1\n": MAPPING,
    "train: images/train\nval: images/val\n": "`names` of",
    "names: ant\ntrain: images/train\n": "must be the list of class names, got 'ant'",
    "names: []\ntrain: images/train\n": "must be the list of class names, got []",
    "names: {a: b}\ntrain: images/train\n": "must be the list of class names, got {'a': 'b'}",
    "names: {0: ant, 2: cat}\ntrain: images/train\n": "must be numbered from 0 without gaps, got [0, 2]",
    "names: {-1: ant, 0: cat}\ntrain: images/train\n": "must be numbered from 0 without gaps, got [-1, 0]",
    "names: [ant, cat, ant]\ntrain: images/train\n": "must be different words, got 'ant' among them",
    "names: [ant, cat, null]\ntrain: images/train\n": "must be different words, got None among them",
    "names: {0: ant, 1: [x], 2: y}\ntrain: images/train\n": "must be different words, got ['x'] among them",
    f"{NAMES}nc: 5\ntrain: images/train\n": "has `nc` 5, but 3 `names`",
    f"{NAMES}nc: three\ntrain: images/train\n": "has `nc` 'three', but 3 `names`",
    f"{NAMES}train: images/nowhere\n": "has the split train in images/nowhere, but there is no such",
    f"{NAMES}train: 3\n": "has the split train in 3, but there is no such",
    f"{NAMES}train: [images/train, gone]\n": "has the split train in gone, but there is no such",
    f"{NAMES}train: {'x' * 300}\n": "but there is no such",
    f'{NAMES}train: "a\\0b"\n': "but there is no such",
    f"{NAMES}train: labels\n": "has no images",
    f"{NAMES}val: images/val\n": "has no split 'train'",
    "names: [ant\ntrain: x\n": "line 2 is not YAML",
    "names:\n\t- ant\n": "line 2 is not YAML: it has a tab, where YAML wants spaces",
    "? [a]\n: b\n": "is not YAML: found unhashable key",
    "names: !!python/object:os.system [x]\ntrain: x": "is not YAML: could not determine a constructor",
    DEEP: "is not YAML: it is nested too deeply",
    POINTER: "is a Git LFS pointer",
    b"\xff\xfe\0\0": "is not YAML: unacceptable character",
    b"\x80names": "is not UTF-8 text",
}


@pytest.mark.parametrize("content", BAD_CONFIGS)
def test_configs_of_yolo(content: str | bytes, splits: Splits, tmp_path: Path) -> None:
    message = refused(write_yolo, splits, tmp_path / "data", "data.yaml", content)
    assert "data" in message and BAD_CONFIGS[content] in message


def test_images_without_any_label_file_are_no_success(splits: Splits, tmp_path: Path) -> None:
    write_labels(splits["train"], tmp_path / "data" / "images" / "train", tmp_path / "other")
    (tmp_path / "data" / "labels" / "train").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"has 7 images, but no label file, such as .*labels/train/train_0\.txt"):
        load_detection_split(tmp_path / "data", "train")


BOX = "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>"


def xml(*changes: tuple[str, str]) -> str:
    """An annotation of one object, with some of its text replaced."""
    text = BOX
    for old, new in changes:
        text = text.replace(old, new)
    return f"<annotation>{text}</annotation>"


NUMBER = "which must be a number"
BAD_XML: dict[str | bytes, str] = {
    "<annotation>": "train_1.xml is not XML",
    "": "train_1.xml is not XML",
    "no xml": "train_1.xml is not XML",
    '{"objects": []}': "train_1.xml is not XML",
    f"<annotation>{BOX}</b>": "train_1.xml is not XML (mismatched tag",
    f"<annotation>{BOX.replace('cat', '&pet;')}</annotation>": "is not XML (undefined entity",
    "<?xml version='1.0' encoding='latin-9'?><annotation/>": "is not XML (unknown encoding",
    b"\xff\xfe": "train_1.xml is not XML",
    b"\0" * 20: "train_1.xml is not XML",
    b"\xff\xd8\xff\xe0JFIF": "train_1.xml is not XML",
    POINTER: "is a Git LFS pointer",
    f"<annotations>{BOX}</annotations>": "is not Pascal VOC: its root is 'annotations'",
    "<a>" * 5000 + "</a>" * 5000: "is not Pascal VOC: its root is 'a'",
    xml(("<name>cat</name>", "")): "object 1 of train_1.xml has no name",
    xml(("cat", " ")): "object 1 of train_1.xml has no name",
    xml(("<name>", "<name><b/>")): "object 1 of train_1.xml has no name",
    xml(("</object>", f"</object>{BOX.replace('cat', '')}")): "object 2 of train_1.xml has no name",
    xml(("<xmin>1</xmin>", "")): f"object 1 of train_1.xml has the xmin None, {NUMBER}",
    xml(("<ymax>8</ymax>", "")): f"has the ymax None, {NUMBER}",
    xml(("xmin", "x_min")): f"has the xmin None, {NUMBER}",
    xml(("bndbox", "polygon")): f"has the xmin None, {NUMBER}",
    xml((">1<", "><")): f"has the xmin '', {NUMBER}",
    xml((">2<", ">two<")): f"has the ymin 'two', {NUMBER}",
    xml((">2<", ">2 px<")): f"has the ymin '2 px', {NUMBER}",
    xml((">2<", ">0x2<")): f"has the ymin '0x2', {NUMBER}",
    xml((">1<", ">1,5<")): f"has the xmin '1,5', {NUMBER}",
    xml((">9<", ">nan<")): f"has the xmax 'nan', {NUMBER}",
    xml((">9<", ">inf<")): f"has the xmax 'inf', {NUMBER}",
    xml((">8<", ">1e999<")): f"has the ymax '1e999', {NUMBER}",
    "<annotation><object><name>cat</name></object></annotation>": f"has the xmin None, {NUMBER}",
}


@pytest.mark.parametrize("content", BAD_XML)
def test_annotations_of_voc(content: str | bytes, splits: Splits, tmp_path: Path) -> None:
    message = refused(write_voc, splits, tmp_path / "data", "Annotations/train_1.xml", content)
    assert BAD_XML[content] in message and "1 problem to correct" in message
    assert len(load_detection_split(tmp_path / "data", "val")) == 4  # the other split is sound


def test_missing_files_of_voc(splits: Splits, tmp_path: Path) -> None:
    write_voc(splits, tmp_path / "data")
    (tmp_path / "data" / "Annotations" / "train_1.xml").unlink()
    (tmp_path / "data" / "JPEGImages" / "train_2.png").unlink()
    with pytest.raises(DatasetError) as error:
        load_detection_split(tmp_path / "data", "train")
    for words in ("2 problems", "annotation file train_1.xml does not exist", "there is no image train_2, with any"):
        assert words in str(error.value)


def test_sizes_that_no_image_has_are_read_from_the_files_of_voc(splits: Splits, tmp_path: Path) -> None:
    write_voc(splits, tmp_path / "data")
    file = tmp_path / "data" / "Annotations" / "train_1.xml"
    file.write_text(file.read_text().replace("<width>42", "<width>" + "9" * 30))
    assert load_detection_split(tmp_path / "data", "train").records[1].width == 42


def entry(kind: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    """Changes the first entry of a list of a COCO file; `...` deletes a key."""

    def change(content: dict[str, Any]) -> None:
        one = content[kind][0]
        one.update({key: value for key, value in changes.items() if value is not ...})
        for key in [key for key, value in changes.items() if value is ...]:
            del one[key]

    return change


def whole(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(changes)


BAD_COCO: list[tuple[Any, str]] = [
    (entry("annotations", category_id=5), "has the unknown category 5"),
    (entry("annotations", category_id="1"), "has the unknown category '1'"),
    (entry("annotations", category_id=None), "has the unknown category None"),
    (entry("annotations", category_id=[1]), "has the unknown category [1]"),
    (entry("annotations", bbox=[1, 2, 3]), "has the box [1, 2, 3], not four numbers"),
    (entry("annotations", bbox="1,2,3,4"), "has the box '1,2,3,4', not four numbers"),
    (entry("annotations", bbox=[[1, 2, 3, 4]]), "not four numbers"),
    (entry("annotations", bbox=[1, 2, True, 4]), "not four numbers"),
    (entry("annotations", bbox=[1, 2, float("nan"), 4]), "which is not finite"),
    (entry("annotations", bbox=[1, 2, 10**400, 4]), "which is not finite"),
    (entry("annotations", bbox=...), "has no `bbox` or no `category_id`"),
    (entry("annotations", image_id=...), "has no `image_id` of type int"),
    (entry("annotations", image_id=True), "has no `image_id` of type int"),
    (entry("annotations", image_id=10**30), "is of the unlisted image"),
    (entry("annotations", area="big"), "has the area 'big', which is not a finite number"),
    (entry("annotations", iscrowd="no"), "has iscrowd 'no', which is neither 0 nor 1"),
    (entry("images", id="one"), "entry 0 has no `id` of type int"),
    (entry("images", id=10**30), "does not fit 64 bits"),
    (entry("images", file_name=3), "entry 0 has no `file_name` of type str"),
    (entry("images", file_name="gone.png"), "gone.png does not exist"),
    (entry("images", file_name="../../x.png"), "leaves the folder"),
    (entry("images", file_name="x" * 300), "does not exist"),
    (entry("images", width=-1), "has no positive whole `width` and `height`"),
    (entry("images", width=10**30), "has no positive whole `width` and `height`"),
    (entry("images", height="30"), "has no positive whole `width` and `height`"),
    (entry("categories", id=None), "entry 0 has no `id` of type int"),
    (entry("categories", name=...), "entry 0 has no `name` of type str"),
    (whole(images=[]), "lists no images"),
    (whole(categories=[]), "lists no categories"),
    (whole(annotations=[3]), "entry 0 has no `image_id` of type int"),
]
NOT_COCO: dict[str | bytes, str] = {
    "{": "is not JSON",
    DEEP: "is not JSON",
    POINTER: "is a Git LFS pointer",
    "\udcff".encode("utf-8", "surrogatepass"): "is not UTF-8 text",
    "[]": "is not COCO",
}
JSON_LAYOUTS: dict[str, tuple[Callable[[Splits, Path], None], str]] = {
    "COCO": (write_coco, "annotations/instances_train.json"),
    "Roboflow": (write_roboflow, "train/_annotations.coco.json"),
    "Label Studio": (write_label_studio, "result.json"),
}


@pytest.mark.parametrize("place", range(len(BAD_COCO)))
@pytest.mark.parametrize("layout", JSON_LAYOUTS)
def test_entries_of_coco_files(layout: str, place: int, splits: Splits, tmp_path: Path) -> None:
    write, file = JSON_LAYOUTS[layout]
    change, wanted = BAD_COCO[place]
    write(splits, tmp_path / "clean")
    content = json.loads((tmp_path / "clean" / file).read_text())
    change(content)
    message = refused(write, splits, tmp_path / "data", file, json.dumps(content))
    assert wanted in message and Path(file).name in message


@pytest.mark.parametrize("content", NOT_COCO)
@pytest.mark.parametrize("layout", ["COCO", "Roboflow"])
def test_files_that_are_not_coco(layout: str, content: str | bytes, splits: Splits, tmp_path: Path) -> None:
    write, file = JSON_LAYOUTS[layout]
    message = refused(write, splits, tmp_path / "data", file, content)
    assert NOT_COCO[content] in message and Path(file).name in message


def line(**objects: Any) -> str:
    """The metadata of an image, with other objects."""
    objects = {"bbox": [[1, 2, 3, 4]], "categories": ["cat"], **objects}
    return json.dumps({"file_name": "train_1.png", "objects": objects})


SCHEMA = "must have the columns `image` and `objects` with `bbox` and `category`"
BAD_METADATA: dict[str | bytes, str] = {
    "{": "cannot be loaded",
    "no json": "cannot be loaded",
    DEEP: "cannot be loaded",
    "[]": "cannot be loaded",
    "": "cannot be loaded",
    POINTER: "cannot be loaded",
    b"\xff\xfe\xfa": "cannot be loaded",
    '{"file_name": "train_1.png"}': SCHEMA,
    line().replace("train_1", "gone"): "train/gone.png of row 0 does not exist",
    '{"file_name": 3, "objects": {"bbox": [], "categories": []}}': "cannot be loaded",
    '{"file_name": null, "objects": {"bbox": [], "categories": []}}': "cannot be loaded",
    '{"objects": {"bbox": [[1, 2, 3, 4]], "categories": ["cat"]}}': "cannot be loaded",
    '{"file_name": "train_1.png", "objects": {"bbox": [[1, 2, 3, 4]]}}': SCHEMA,
    '{"file_name": "train_1.png", "objects": {"categories": ["cat"]}}': SCHEMA,
    '{"file_name": "train_1.png", "objects": []}': SCHEMA,
    '{"file_name": "train_1.png", "objects": null}': SCHEMA,
    '{"file_name": "train_1.png", "objects": "cat"}': SCHEMA,
    '{"file_name": "train_1.png", "objects": [1, 2]}': SCHEMA,
    line(bbox=[[1, 2, 3]]): "row 0 has the box [1, 2, 3], not four numbers",
    line(bbox=[1, 2, 3, 4]): "row 0 differ in length",
    line(bbox=[7]): "has the box 7, not four numbers",
    line(bbox="1 2 3 4"): "The field `bbox` in `objects` of",
    line(bbox=[[1, 2, None, 4]]): "not four numbers",
    line(bbox=[["1", "2", "3", "4"]]): "not four numbers",
    line(bbox=[{"x": 1}]): "not four numbers",
    line(bbox=[]): "row 0 differ in length",
    line(categories=[]): "must hold class names or numbers",
    line(categories=[None]): "must hold class names or numbers",
    line(categories=[1.5]): "must hold class names or numbers",
    line(categories=["cat", "ant"]): "row 0 differ in length",
    line(categories="cat"): "The field `categories` in `objects` of",
    line(categories=[["cat"]]): "must hold class names or numbers",
    line(iscrowd=[2]): "row 0 has iscrowd 2, which is neither 0 nor 1",
    line(area=["big"]): "row 0 has the area 'big', which is not a finite number",
    line(area=[1, 2]): "row 0 differ in length",
}


@pytest.mark.parametrize("content", BAD_METADATA)
def test_metadata_of_imagefolders(content: str | bytes, splits: Splits, tmp_path: Path) -> None:
    one = {"train": splits["train"].select([1])}
    message = refused(write_imagefolder, one, tmp_path / "data", "train/metadata.jsonl", content)
    assert BAD_METADATA[content] in message and str(tmp_path / "data") in message
