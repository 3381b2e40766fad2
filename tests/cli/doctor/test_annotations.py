"""Splits, boxes and classes, looked at without a teacher."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from PIL import Image

from hf_detrkd.cli import arguments as distill_arguments
from hf_detrkd.cli.doctor import Statistics, offered_splits
from hf_detrkd.cli.doctor import check_data as doctor_data
from hf_detrkd.cli.doctor.findings import Report
from hf_detrkd.data import load_detection_split
from hf_detrkd.data.faults import repair_fault
from hf_detrkd.data.records import RepairedBoxes
from hf_detrkd.data.shapes import SHAPE_CLASSES, ShapesRecords
from tests.cli.doctor.runs import IMAGES, SIDE, line, said, write_shapes


def test_boxes_betray_themselves(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "relative", lambda b: [v / SIDE for v in b])
    fault = Statistics.of(load_detection_split(folder), "it").fault()
    assert fault is not None and "normalised by the image size: write them as" in fault
    folder = write_shapes(tmp_path / "corners", lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
    repaired = load_detection_split(folder).repaired
    assert repair_fault(repaired) is not None
    assert repaired.source.endswith("instances_validation.json")
    assert repaired.boxes == sum(len(r.boxes) for r in ShapesRecords(IMAGES, 0, "validation"))
    assert repair_fault(RepairedBoxes("it", 100, 3, 40)) is None


def test_statistics_are_those_of_the_annotations(tmp_path: Path, shapes: str) -> None:
    data = load_detection_split(shapes)
    found, records = Statistics.of(data, "it"), list(data.records)
    assert (found.images, found.boxes, found.empty) == (IMAGES, sum(len(r.boxes) for r in records), 0)
    assert found.per_image[1] == max(len(r.boxes) for r in records)
    assert list(found.classes) == SHAPE_CLASSES and sum(found.classes.values()) == found.boxes
    assert 12 <= found.sides[0] <= found.sides[1] <= found.sides[2] <= 48
    assert 0.9 < min(found.reach) <= max(found.reach) <= 1 and found.fault() is None
    report = Report()
    doctor_data.describe(report, "train", found)
    assert [finding["status"] for finding in report.findings] == ["ok"]
    small = load_detection_split(write_shapes(tmp_path, lambda b: [v / 2 for v in b]))
    doctor_data.describe(report, "small", Statistics.of(small, "it"))
    assert "were smaller images annotated?" in report.findings[-1]["text"]


def test_a_missing_split_is_named_with_what_to_pass_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "data", splits=(("train_set", 4), ("holdout", 4), ("val_set", 4)))
    report = Report()
    splits = doctor_data.load_data(report, distill_arguments.parse(line(tmp_path, folder)))
    text = said(report, "splits", "problem")
    assert (
        "has no split named train, train2017 or training to train on: choose one of holdout, train_set, val_set."
        in text
    )
    assert "Pass --dataset_train_split train_set --dataset_eval_split val_set;" in text
    assert splits is not None and len(splits.train) == len(splits.eval) == 4
    given = ["--dataset_train_split", "train_set", "--dataset_eval_split", "val_set"]
    healthy = Report()
    doctor_data.load_data(healthy, distill_arguments.parse(line(tmp_path, folder, *given)))
    assert "splits" not in {finding["subject"] for finding in healthy.findings}


def test_the_splits_offered_are_those_of_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "image": [Image.new("RGB", (64, 64))],
        "objects": [{"bbox": [[4.0, 4.0, 20.0, 20.0]], "category": ["car"]}],
    }
    configured = {"cars": ("train_cars", "val_cars"), None: ("train_all", "val_all")}

    def load(_: str, config: str | None) -> datasets.DatasetDict:
        return datasets.DatasetDict({split: datasets.Dataset.from_dict(rows) for split in configured[config]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    report = Report()
    words = line(tmp_path, "user/data", "--dataset_config_name", "cars")
    doctor_data.load_data(report, distill_arguments.parse(words))
    assert "Pass --dataset_train_split train_cars --dataset_eval_split val_cars;" in said(report, "splits", "problem")


def test_a_single_split_is_not_enough_and_other_faults_keep_their_own_words(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "data", splits=(("train", 4),))
    assert offered_splits(folder, "train", None) == (["train"], "train", None)
    report = Report()
    assert doctor_data.load_data(report, distill_arguments.parse(line(tmp_path, folder))) is None
    assert "Training needs two splits" in said(report, "splits", "problem")
    report = Report()
    assert doctor_data.load_data(report, distill_arguments.parse(line(tmp_path, str(tmp_path / "none")))) is None
    assert "No data set" in said(report, "data set", "problem")
    whole = write_shapes(tmp_path / "whole", splits=(("train", 2), ("val", 2)))
    (Path(whole) / "train" / "1.png").unlink()
    report = Report()
    assert doctor_data.load_data(report, distill_arguments.parse(line(tmp_path, whole))) is None
    assert "1.png does not exist" in said(report, "data set", "problem")
