from __future__ import annotations

import json
import logging
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from hf_detrkd.data import (
    DatasetError,
    DetectionCollator,
    DetectionTransform,
    UnreadableImageError,
    load_detection_split,
    load_detection_splits,
)


def test_sparse_ids_become_indices_and_come_back(coco_folder, coco_content):
    dataset = load_detection_split(coco_folder(coco_content))
    assert dataset.classes == ["ant", "cat", "zebra"] and dataset.category_ids == [4, 17, 90]
    assert [record.image_id for record in dataset.records] == [7, 3, 5]
    first, second, empty = dataset.records
    assert first.boxes.tolist() == [[1.5, 2.5, 10, 10], [0, 0, 40, 15], [20, 15, 4, 6]]
    assert first.categories.tolist() == [0, 2, 1] and first.iscrowd.tolist() == [False, True, False]
    assert first.area.tolist() == [100, 600, 24] and second.area.tolist() == [100.5]
    assert second.load().size == (20, 50) == (second.width, second.height)
    assert empty.boxes.shape == (0, 4) and len(empty.categories) == 0
    truth = dataset.coco_ground_truth()
    assert sorted(entry["category_id"] for entry in truth["annotations"]) == [4, 17, 90, 90]
    assert truth["categories"] == sorted(coco_content["categories"], key=lambda entry: entry["id"])


def test_images_are_read_only_when_asked_for(coco_folder, coco_content, monkeypatch):
    folder = coco_folder(coco_content)

    def refuse(*args):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    load_detection_split(folder)


def test_size_is_read_from_the_file_where_the_json_has_none(coco_folder, coco_content):
    folder = coco_folder(coco_content)
    for entry in coco_content["images"]:
        del entry["width"], entry["height"]
    coco_content["annotations"][0]["bbox"] = [10, 30, 100, 100]
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(coco_content))
    record = load_detection_split(folder).records[1]
    assert (record.width, record.height) == (20, 50) and record.boxes.tolist() == [[10, 30, 10, 20]]


def test_boxes_are_clipped_and_dropped_and_reported_once(coco_folder, coco_content, caplog):
    boxes = [[-5, -5, 10, 10], [30, 20, 20, 20], [50, 50, 5, 5], [3, 3, 0, 5], [3, 3, 5, -1], [-9, 0, 9, 5]]
    boxes += [[30, 20, 10.0000001, 10], [-1e-9, 3, 8, 8]]
    coco_content["annotations"] = [
        {"id": i, "image_id": 7, "category_id": 4, "bbox": box} for i, box in enumerate(boxes)
    ]
    with caplog.at_level(logging.WARNING):
        record = load_detection_split(coco_folder(coco_content)).records[0]
    assert np.allclose(record.boxes, [[0, 0, 5, 5], [30, 20, 10, 10], [30, 20, 10, 10], [0, 3, 8, 8]])
    assert record.area[:2].tolist() == [25, 100], "areas that the source does not give follow the clipped box"
    (message,) = [entry.getMessage() for entry in caplog.records]
    assert "instances_val.json: 8 boxes: dropped 4 with no area inside the image, clipped 2" in message


def test_a_healthy_set_warns_of_nothing(coco_folder, coco_content, caplog):
    load_detection_split(coco_folder(coco_content))
    assert not caplog.records


def broken(content, kind, position, **changes):
    entry = content[kind][position]
    entry |= changes
    for key in [key for key, value in changes.items() if value is ...]:
        del entry[key]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("annotations", 0, {"category_id": 5}), "1 problem to correct .*: annotation 1 has the unknown category 5"),
        (("annotations", 0, {"category_id": "4"}), "annotation 1 has the unknown category '4'"),
        (("annotations", 0, {"category_id": True}), "annotation 1 has the unknown category True"),
        (("annotations", 0, {"category_id": 4.0}), r"annotation 1 has the unknown category 4\.0"),
        (("annotations", 0, {"bbox": [1, 2, 3]}), r"annotation 1 has the box \[1, 2, 3\], not four numbers"),
        (("annotations", 0, {"bbox": [1, 2, 3, 4, 5]}), "not four numbers"),
        (("annotations", 0, {"bbox": None}), "annotation 1 has the box None, not four numbers"),
        (("annotations", 0, {"bbox": [1, 2, "3", 4]}), "not four numbers"),
        (("annotations", 0, {"bbox": [1, 2, True, 4]}), "not four numbers"),
        (("annotations", 0, {"bbox": {"x": 1}}), "not four numbers"),
        (("annotations", 0, {"bbox": [1, float("nan"), 3, 4]}), r"box \[1, nan, 3, 4\], which is not finite"),
        (("annotations", 0, {"bbox": [1, 2, float("inf"), 4]}), "which is not finite"),
        (("annotations", 0, {"area": float("nan")}), "annotation 1 has the area nan, which is not a finite number"),
        (("annotations", 0, {"area": "big"}), "annotation 1 has the area 'big'"),
        (("annotations", 0, {"iscrowd": 2}), "annotation 1 has iscrowd 2, which is neither 0 nor 1"),
        (("annotations", 0, {"image_id": 99}), "annotation 1 is of the unlisted image 99"),
        (("annotations", 0, {"image_id": "3"}), "not COCO: `annotations` .*entry 0 has no `image_id` of type int"),
        (("annotations", 1, {"bbox": ...}), "not COCO: `annotations` .*entry 1 has no `bbox` or no `category_id`"),
        (("annotations", 1, {"image_id": ...}), "not COCO: `annotations` .*entry 1 has no `image_id`"),
        (("images", 1, {"id": 7}), "the image id 7 is used more than once"),
        (("images", 1, {"id": "three"}), "not COCO: `images` .*entry 1 has no `id` of type int"),
        (("images", 1, {"file_name": ...}), "not COCO: `images` .*entry 1 has no `file_name` of type str"),
        (("images", 1, {"width": "20"}), "deep/b.png has no positive whole `width` and `height`"),
        (("images", 1, {"height": 0}), "deep/b.png has no positive whole `width` and `height`"),
        (("images", 1, {"file_name": "gone.png"}), "the image file .*val/gone.png does not exist"),
        (("images", 1, {"file_name": "../x.png"}), "the file_name '../x.png' leaves the folder .*val"),
        (("images", 1, {"file_name": "a/../../x.png"}), "leaves the folder"),
        (("images", 1, {"file_name": "..\\x.png"}), "leaves the folder"),
        (("images", 1, {"file_name": "/etc/x.png"}), "the file_name '/etc/x.png' leaves the folder"),
        (("images", 1, {"file_name": "C:\\x.png"}), "leaves the folder"),
        (("categories", 1, {"id": "4"}), "not COCO: `categories` .*entry 1 has no `id` of type int"),
        (("categories", 1, {"name": None}), "not COCO: `categories` .*entry 1 has no `name` of type str"),
        (("categories", 1, {"id": 90}), "`categories` .*the id 90 is used more than once"),
        (("categories", 1, {"name": "cat"}), "`categories` .*the name 'cat' is used more than once"),
    ],
)
def test_bad_input_is_one_error_before_training(coco_folder, coco_content, change, message):
    folder = coco_folder(coco_content)
    kind, position, changes = change
    broken(coco_content, kind, position, **changes)
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(coco_content))
    with pytest.raises(DatasetError, match=message) as error:
        load_detection_split(folder)
    assert "instances_val.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "instances_val.json is not JSON"),
        ("", "is not JSON"),
        ("[]", "is not COCO: it must have the lists images, annotations, categories, got list"),
        ('{"images": [], "info": 1}', r"got \['images', 'info'\]"),
        ('{"images": {}, "annotations": [], "categories": []}', "is not COCO"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no images"),
        (
            '{"images": [3], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
            "entry 0 has no `id` of type int",
        ),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [], "categories": []}', "lists no categories"),
        (b"\xff\xfe{".decode("latin-1"), "is not JSON"),
    ],
)
def test_a_json_that_is_not_coco(coco_folder, text, message):
    with pytest.raises(DatasetError, match=message):
        load_detection_split(coco_folder(text))


def test_the_first_ten_offenders_are_named_of_all_kinds(coco_folder, coco_content):
    folder = coco_folder(coco_content)
    coco_content["images"][0]["file_name"] = "gone.png"
    coco_content["annotations"] += [{"id": 100 + i, "image_id": 5, "category_id": 5, "bbox": [1]} for i in range(7)]
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(coco_content))
    with pytest.raises(
        DatasetError, match=r"has 15 problems to correct before training \(the first 10 of them\)"
    ) as error:
        load_detection_split(folder)
    offenders = str(error.value).split("of them): ")[1].split("; ")
    assert len(offenders) == 10 and "gone.png" in offenders[0] and "annotation 101 has the unknown" in offenders[-1]


def test_unreadable_image_names_its_file_when_it_is_read(coco_folder, coco_content):
    folder = coco_folder(coco_content)
    (folder / "val" / "c.png").write_bytes(b"no image")
    dataset = load_detection_split(folder).with_transform(DetectionTransform((8, 8)))
    dataset[0]
    with pytest.raises(UnreadableImageError, match=r"val/c.png cannot be read"):
        dataset[2]


def test_skipping_drops_and_counts_unreadable_images(coco_folder, coco_content, caplog):
    folder = coco_folder(coco_content)
    (folder / "val" / "a.png").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        dataset = load_detection_split(folder, skip_unreadable_images=True)
    assert [record.image_id for record in dataset.records] == [3, 5]
    assert dataset.with_transform(DetectionTransform((8, 8)))[0]["labels"]["image_id"].tolist() == [3]
    assert {entry["image_id"] for entry in dataset.coco_ground_truth()["annotations"]} == {3}
    assert "1 images cannot be read and were dropped, among them" in caplog.text and "a.png" in caplog.text


def test_skipping_everything_is_an_error(coco_folder, coco_content):
    folder = coco_folder(coco_content)
    for name in ("a.png", "deep/b.png", "c.png"):
        (folder / "val" / name).write_bytes(b"")
    with pytest.raises(DatasetError, match=r"None of the 3 images of .* can be read"):
        load_detection_split(folder, skip_unreadable_images=True)


@pytest.mark.parametrize("skip", [False, True])
def test_a_size_that_disagrees_with_the_file_names_it(coco_folder, coco_content, skip):
    folder = coco_folder(coco_content)
    Image.new("RGB", (30, 40)).save(folder / "val" / "a.png")
    with pytest.raises(DatasetError, match=r"a.png is 30x40 pixels .* but its annotations say 40x30"):
        load_detection_split(folder, skip_unreadable_images=skip).records[0].load()


def test_splits_with_other_categories_are_joined_by_name(coco_folder, coco_content, caplog):
    coco_folder(coco_content, "train")
    before = load_detection_split(coco_folder(coco_content, "val"))
    coco_content["categories"] = [
        {"id": 1, "name": "zebra"},
        {"id": 4, "name": "horse"},
        {"id": 17, "name": "ant"},
        {"id": 20, "name": "cat"},
    ]
    numbers = {90: 1, 4: 17, 17: 20}
    for one in coco_content["annotations"]:
        one["category_id"] = numbers[one["category_id"]]
    splits = load_detection_splits(coco_folder(coco_content, "val"))
    assert splits.train.classes == splits.eval.classes == ["ant", "cat", "zebra", "horse"]
    for record, other in zip(splits.eval.records, before.records, strict=True):
        assert record.categories.tolist() == other.categories.tolist()
    assert splits.train.category_ids == [0, 1, 2, 3]  # 4 is the ant of one and the horse of the other
    (line,) = [r.getMessage() for r in caplog.records if "joined by name" in r.getMessage()]
    assert re.search(r"horse +- +4\n", line + "\n") and re.search(r"ant +4 +17", line)


def test_splits_without_a_common_class_are_refused(coco_folder, coco_content):
    coco_folder(coco_content, "train")
    for one in coco_content["categories"]:
        one["name"] += "s"
    with pytest.raises(DatasetError, match=r"train and val have no class in common: \['ant', 'cat', 'zebra'\] and"):
        load_detection_splits(coco_folder(coco_content, "val"))


def test_evaluation_split_and_missing_splits(coco_folder, coco_content):
    folder = coco_folder(coco_content, "train")
    with pytest.raises(
        DatasetError, match=r"no split named validation, val, .* or test to evaluate on: choose one of train"
    ):
        load_detection_splits(folder)
    coco_folder(coco_content, "test")
    assert len(load_detection_splits(folder, max_eval_samples=1).eval) == 1
    smaller = {**coco_content, "images": coco_content["images"][:2]}
    coco_folder({**smaller, "annotations": []}, "val")
    splits = load_detection_splits(str(folder), max_train_samples=50)
    assert len(splits.train) == 3 and len(splits.eval) == 2, "val comes before test, and 50 of 3 are 3"
    assert len(load_detection_splits(folder, eval_split="test").eval) == 3
    with pytest.raises(DatasetError, match="has no split 'minival': choose one of test, train, val"):
        load_detection_splits(folder, eval_split="minival")
    with pytest.raises(DatasetError, match="'train' must be positive, got 0"):
        load_detection_splits(folder, max_train_samples=0)


def test_annotations_under_other_names_are_those_of_the_file_s_name(coco_folder, coco_content):
    folder = coco_folder(coco_content)
    shutil.move(folder / "annotations" / "instances_val.json", folder / "annotations" / "val.json")
    assert len(load_detection_split(folder)) == 3
    (folder / "annotations" / "val.json").unlink()
    with pytest.raises(DatasetError, match=r"annotations must contain instances_<split>.json files, but has none"):
        load_detection_split(folder)


def test_photographs_of_cards(real_data):
    splits = load_detection_splits(real_data("cards"), max_train_samples=40)
    assert len(splits.train) == 40 and len(splits.eval) == 67
    assert splits.eval.classes == ["nine", "ten", "jack", "queen", "king", "ace"]
    evaluation = splits.eval.with_transform(DetectionTransform({"shortest_edge": 128, "longest_edge": 160}))
    batch = DetectionCollator()([evaluation[i] for i in range(4)])
    assert (
        batch["pixel_values"].shape[:2] == (4, 3) and batch["pixel_mask"].shape[1:] == batch["pixel_values"].shape[2:]
    )
    for label, record in zip(batch["labels"], evaluation.records, strict=False):
        scale = torch.tensor([record.width, record.height] * 2)
        corner = label["boxes"][:, :2] - label["boxes"][:, 2:] / 2
        restored = torch.cat([corner, label["boxes"][:, 2:]], 1) * scale
        assert torch.allclose(restored, torch.from_numpy(record.boxes).float(), atol=1e-3)


def test_sample_of_coco_keeps_crowds_and_ids(real_data):
    folder = real_data("coco_sample")
    dataset = load_detection_split(folder).with_transform(DetectionTransform((64, 64)))
    source = json.loads((folder / "annotations" / "instances_val.json").read_text())
    truth = dataset.coco_ground_truth()
    assert len(dataset) == 64 and len(truth["annotations"]) == 647 and dataset.category_ids[-1] == 90
    assert sum(len(dataset[i]["labels"]["crowd_labels"]) for i in range(64)) == 10

    def key(entry):
        return entry["image_id"], entry["category_id"], entry["area"], entry["iscrowd"]

    assert sorted(map(key, truth["annotations"])) == sorted(map(key, source["annotations"]))
