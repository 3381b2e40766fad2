from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_detrkd.data import (
    AugmentationConfig,
    DatasetError,
    DetectionTransform,
    UnreadableImageError,
    load_detection_split,
    load_detection_splits,
)
from hf_detrkd.evaluation import CocoBoxMetric, references_from_labels


CLASSES = ["Car", "Pedestrian", "Cyclist"]
IGNORED = ["Van", "Truck", "Person_sitting", "Tram", "Misc", "DontCare"]


def line(kind: str, *box: float | str) -> str:
    """One object in KITTI's 15 fields."""
    return " ".join([kind, "0.00 0 -1.57", *map(str, box), "1.50 1.60 3.70 1.80 1.50 20.00 -1.60"])


@pytest.fixture
def kitti(tmp_path: Path) -> Callable[..., Path]:
    """Writes label files, given by name and their lines, with an image for each; returns the folder of both."""

    def write(labels: Mapping[str, list[str]], root: Path = tmp_path / "kitti", suffix: str = ".png") -> Path:
        for folder in ("image_2", "label_2"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for name, lines in labels.items():
            Image.new("RGB", (100, 40), (200, 30, 60)).save(root / "image_2" / f"{name}{suffix}")
            (root / "label_2" / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
        return root

    return write


def listed(folder: Path, **splits: list[str]) -> None:
    (folder / "ImageSets").mkdir()
    for split, names in splits.items():
        (folder / "ImageSets" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def frames(count: int) -> dict[str, list[str]]:
    return {f"{i:06d}": [line("Car", 10, 5, 30, 25)] for i in range(count)}


def ids(dataset) -> list[int]:
    return [record.image_id for record in dataset.records]


def test_boxes_classes_sizes_and_ids(kitti):
    objects = [
        line("Cyclist", 10.5, 5, 30, 25.25),
        line("Car", 0, 0, 20, 10) + " 0.93",
        line("Pedestrian", 1, 2, 3, 7),
    ]
    folder = kitti({"000004": objects, "000010": []})
    listed(folder, val=["000010", "000004"])
    dataset = load_detection_split(folder)
    assert dataset.classes == CLASSES and ids(dataset) == [10, 4]
    empty, record = dataset.records
    assert record.boxes.tolist() == [[10.5, 5, 19.5, 20.25], [0, 0, 20, 10], [1, 2, 2, 5]]
    assert record.categories.tolist() == [2, 0, 1] and not record.iscrowd.any()
    assert record.area.tolist() == [19.5 * 20.25, 200, 10]
    assert record.load().size == (100, 40) == (record.width, record.height)
    assert empty.boxes.shape == (0, 4)


@pytest.mark.parametrize("kind", IGNORED)
def test_other_types_are_regions_of_every_class_that_training_never_sees(kitti, kind):
    folder = kitti({"000000": [line(kind, 50, 10, 90, 30), line("Pedestrian", 10, 5, 30, 25)]})
    listed(folder, train=["000000"], val=["000000"])
    (record,) = load_detection_split(folder).records
    assert record.categories.tolist() == [0, 1, 2, 1] and record.iscrowd.tolist() == [True] * 3 + [False]
    assert record.boxes.tolist() == [[50, 10, 40, 20]] * 3 + [[10, 5, 20, 20]]
    splits = load_detection_splits(folder)
    training = DetectionTransform((40, 100), augmentation=AugmentationConfig.none())
    labels = splits.train.with_transform(training)[0]["labels"]
    assert labels["class_labels"].tolist() == [1] and "crowd_boxes" not in labels
    assert torch.allclose(labels["boxes"], torch.tensor([[0.2, 0.375, 0.2, 0.5]]))
    labels = splits.eval.with_transform(DetectionTransform((40, 100)))[0]["labels"]
    assert labels["class_labels"].tolist() == [1] and labels["crowd_labels"].tolist() == [0, 1, 2]


def test_detections_in_an_ignored_region_are_not_wrong(kitti):
    objects = [line(kind, 10 * i, 5, 10 * i + 10, 25) for i, kind in enumerate(CLASSES)]
    folder = kitti({"000000": [*objects, line("DontCare", 50, 10, 90, 35)]})
    listed(folder, val=["000000"])
    item = load_detection_split(folder).with_transform(DetectionTransform((40, 100)))[0]
    (truth,) = references_from_labels([item["labels"]])

    def score(*extra: list[float]) -> dict[str, float]:
        """Every object is found, but each class answers `extra` with more confidence."""
        metric = CocoBoxMetric(dict(enumerate(CLASSES)))
        boxes = [*truth["boxes"][:3].tolist(), *[box for box in extra for _ in CLASSES]]
        scores = [0.5] * 3 + [0.9] * 3 * len(extra)
        labels = [0, 1, 2] * (1 + len(extra))
        answer = {"image_id": 0, "boxes": boxes, "scores": scores, "labels": labels}
        metric.add_batch(predictions=[answer], references=[truth])
        return metric.compute()

    inside = score([55, 12, 65, 30], [60, 15, 85, 34], [50, 10, 90, 35])
    outside = score([55, 36, 90, 40])
    for name in CLASSES:
        assert inside[f"map_{name}"] == pytest.approx(1.0) and outside[f"map_{name}"] == pytest.approx(0.5)


def test_splits_are_drawn_eight_to_two_with_the_seed(kitti):
    folder = kitti(frames(20))
    splits = load_detection_splits(folder)
    train, val = ids(splits.train), ids(splits.eval)
    assert val == [2, 4, 6, 19], "other images than before: results of other versions no longer compare"
    assert train == [i for i in range(20) if i not in val]
    assert ids(load_detection_splits(folder).eval) == val == ids(load_detection_split(folder, "val"))
    other = load_detection_splits(folder, seed=1)
    assert ids(other.eval) != val and sorted(ids(other.train) + ids(other.eval)) == list(range(20))
    first = load_detection_splits(folder, max_train_samples=3, max_eval_samples=2)
    assert ids(first.train) == train[:3] and ids(first.eval) == val[:2]


def test_a_set_too_small_to_divide(kitti):
    with pytest.raises(DatasetError, match=r"The split 'val' of .*kitti has no images"):
        load_detection_splits(kitti(frames(2)))


def test_lists_of_image_sets_are_the_splits(kitti):
    folder = kitti(frames(6))
    listed(folder, train=["000005", "000001", ""], val=["000002"])
    splits = load_detection_splits(folder)
    assert ids(splits.train) == [5, 1] and ids(splits.eval) == [2]
    (folder / "ImageSets" / "val.txt").unlink()
    with pytest.raises(
        DatasetError, match=r"no split named validation, val, .* or test to evaluate on: choose one of train"
    ):
        load_detection_splits(folder)
    with pytest.raises(DatasetError, match="has no split 'test': choose one of train"):
        load_detection_splits(folder, eval_split="test")


def test_the_folder_that_kitti_unpacks_into(kitti, tmp_path):
    kitti(frames(10), root=tmp_path / "kitti" / "training", suffix=".jpg")
    (tmp_path / "kitti" / "testing" / "image_2").mkdir(parents=True)
    outer, inner = load_detection_splits(str(tmp_path / "kitti")), load_detection_splits(tmp_path / "kitti/training")
    assert ids(outer.train) == ids(inner.train) and len(outer.train) == 8 and len(outer.eval) == 2
    listed(tmp_path / "kitti", train=["000000"], val=["000009"])
    assert ids(load_detection_split(tmp_path / "kitti")) == [9]


@pytest.mark.parametrize("name", ["b", "9" * 19], ids=["a word", "more than 64 bits"])
def test_names_that_are_no_image_ids_count_from_zero(kitti, name):
    folder = kitti({name: [], "000007": [], "000005": []})
    listed(folder, val=[name, "000007"])
    assert ids(load_detection_split(folder)) == [2, 1]


def test_boxes_are_clipped_and_dropped_and_reported_once(kitti, caplog):
    folder = kitti({"000000": [line("Car", -5, 5, 30, 60), line("Cyclist", 30, 5, 20, 25), line("Car", 1, 2, 3, 4)]})
    listed(folder, val=["000000"])
    with caplog.at_level(logging.WARNING):
        (record,) = load_detection_split(folder).records
    assert record.boxes.tolist() == [[0, 5, 30, 35], [1, 2, 2, 2]]
    (message,) = [entry.getMessage() for entry in caplog.records]
    assert "split val: 3 boxes: dropped 1 with no area inside the image, clipped 1 to the image." in message


CAR = line("Car", 10, 5, 30, 25)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (CAR.rsplit(" ", 1)[0], "an object must have 15 fields, or 16 with a score, got 14"),
        (f"{CAR} 0.5 7", "got 17"),
        ("Car", "got 1"),
        (CAR.replace("Car", "Bus"), "the type 'Bus' is not one of Car, Pedestrian, Cyclist, Van, .*, DontCare"),
        (CAR.replace("Car", "car"), "the type 'car' is not one of Car"),
        (line("Car", 10, "five", 30, 25), "the box coordinate 'five' is not a finite number"),
        (line("DontCare", 10, 5, "nan", 25), "the box coordinate 'nan' is not a finite number"),
        (line("Car", "-inf", 5, 30, 25), "the box coordinate '-inf' is not a finite number"),
        (line("Car", -1e308, 5, 1e308, 25), "which is not finite"),
    ],
)
def test_a_malformed_line_names_its_file_and_itself(kitti, bad, message):
    folder = kitti({"000012": [CAR, "", bad, CAR, CAR]})
    listed(folder, val=["000012"])
    with pytest.raises(DatasetError, match=message) as error:
        load_detection_split(folder)
    start = f"{folder}, split val has 1 problem to correct before training: label_2/000012.txt, line 3"
    assert str(error.value).startswith(start) and "\n" not in str(error.value)


def test_all_problems_are_one_error(kitti):
    folder = kitti({"000000": [CAR], "000001": ["Car 1", CAR, "Bus 2"], "000002": [], "000003": [CAR.lower()]})
    (folder / "image_2" / "000000.png").unlink()
    (folder / "label_2" / "000002.txt").unlink()
    listed(folder, train=["000000", "000001", "000002", "000003", "../000001"])
    with pytest.raises(DatasetError, match="split train has 7 problems to correct before training: ") as error:
        load_detection_split(folder, "train")
    problems = str(error.value).split("training: ")[1].split("; ")
    assert problems[0] == "the image file image_2/000000.png (or .jpg) does not exist"
    assert "image_2/../000001.png" in problems[1] and "label_2/../000001.txt" in problems[3]
    assert problems[2] == "the label file label_2/000002.txt does not exist"
    lines = ["label_2/000001.txt, line 1: ", "label_2/000001.txt, line 3: ", "label_2/000003.txt, line 1: "]
    assert all(problem.startswith(place) for problem, place in zip(problems[4:], lines, strict=True))


@pytest.mark.parametrize(("gone", "message"), [("image_2", "image file image_2"), ("label_2", "label file label_2")])
def test_drawn_splits_miss_no_file(kitti, gone, message):
    folder = kitti(frames(10))
    for file in (folder / gone).iterdir():
        file.unlink()
    (folder / gone).rmdir()
    with pytest.raises(DatasetError, match=f"split train has 8 problems .*: the {message}/0000"):
        load_detection_splits(folder)


def test_unreadable_images_are_named_or_skipped(kitti):
    folder = kitti(frames(3))
    (folder / "image_2" / "000001.png").write_bytes(b"no image")
    listed(folder, val=["000000", "000001", "000002"])
    dataset = load_detection_split(folder).with_transform(DetectionTransform((8, 8)))
    with pytest.raises(UnreadableImageError, match=r"image_2/000001.png cannot be read"):
        dataset[1]
    assert ids(load_detection_split(folder, skip_unreadable_images=True)) == [0, 2]


def test_two_files_of_one_image_are_a_problem(kitti):
    folder = kitti({"000001": [], "000002": []})
    kitti({"000001": []}, suffix=".jpg")
    listed(folder, train=["000002", "000002"], val=["000001"])
    with pytest.raises(DatasetError, match=r"1 problem .*: image_2 contains both 000001.png and 000001.jpg"):
        load_detection_split(folder)
    (folder / "image_2" / "000001.jpg").unlink()
    with pytest.raises(DatasetError, match=r"1 problem .*: the image 000002 repeats the image id 2"):
        load_detection_split(folder, "train")


def test_a_folder_without_a_layout_names_those_that_are_read(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        DatasetError, match=r"none of the layouts .* KITTI \(image_2/, label_2/\); .* notes.txt, photos/\."
    ):
        load_detection_split(tmp_path)
    with pytest.raises(DatasetError, match="was found locally or on the Hub"):
        load_detection_split(tmp_path / "nowhere")
