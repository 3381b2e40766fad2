"""The doctor finds what it is for, and nothing in a healthy pair: the quickstart's teacher on generated images."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from hf_detrkd import Teacher, diagnosis
from hf_detrkd.adapters import class_names
from hf_detrkd.data import load_detection_split
from hf_detrkd.data.shapes import SHAPE_CLASSES, ShapesRecords
from hf_detrkd.diagnosis import (
    Mended,
    Seen,
    Statistics,
    View,
    better_frame,
    fitting_batch,
    look,
    mended_boxes,
    offered_splits,
    renamed,
    with_renamed,
)
from hf_detrkd.teacher import NO_NORMALIZATION
from tests.hub_server import HubServer


ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "scripts" / "recipes" / "quickstart"
sys.path.insert(0, str(ROOT / "scripts"))
import distill  # noqa: E402
import doctor  # noqa: E402
import doctor_data  # noqa: E402
import doctor_pair  # noqa: E402
import doctor_step  # noqa: E402
import doctor_teacher  # noqa: E402
from doctor_report import Report  # noqa: E402


Box = Callable[[list[float]], list[float]]
FRAMES: dict[str, tuple[Box, Any]] = {
    "corners": (lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]], "x_min, y_min, x_max, y_max"),
    "centres": (lambda b: [b[0] + b[2] / 2, b[1] + b[3] / 2, b[2], b[3]], "centre x, centre y"),
    "transposed": (lambda b: [b[1], b[0], b[3], b[2]], "y, x, height, width"),
    "relative": (lambda b: [v / 128 for v in b], "divided by the image's"),
    "relative corners": (
        lambda b: [b[0] / 128, b[1] / 128, (b[0] + b[2]) / 128, (b[1] + b[3]) / 128],
        "x_min, y_min, x_max, y_max divided by",
    ),
    "half": (lambda b: [v / 2 for v in b], (0.5, 0.5)),
    "wide": (lambda b: [b[0] * 0.75, b[1] * 0.6, b[2] * 0.75, b[3] * 0.6], (0.75, 0.6)),
    "larger": (lambda b: [1.25 * v for v in b], (1.25, 1.25)),
}


def write_shapes(folder: Path, box: Box = list, splits: Sequence[tuple[str, int]] = ()) -> str:
    """Generated images as a COCO folder, with their boxes written in some way."""
    for split, count in splits or (("train", 8), ("validation", 32)):
        records = ShapesRecords(count, 0, "train" if split == "train" else "validation")
        (folder / split).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        content: dict[str, list[Any]] = {"images": [], "annotations": []}
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(SHAPE_CLASSES)]
        for i, record in enumerate(records):
            record.load().save(folder / split / f"{i}.png")
            content["images"].append({"id": i, "file_name": f"{i}.png", "width": 128, "height": 128})
            for corners, category in zip(record.boxes.tolist(), record.categories.tolist(), strict=True):
                number = len(content["annotations"]) + 1
                content["annotations"].append(
                    {"id": number, "image_id": i, "category_id": category, "bbox": box(corners), "iscrowd": 0}
                )
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shapes(tmp_path_factory.mktemp("shapes"))


def line(folder: Path, data: str, *more: str, teacher: str | Path = QUICKSTART / "teacher") -> list[str]:
    """The command line of a small run; of two values for an argument the last counts."""
    words = f"--dataset_name {data} --image_size 128 --method kd_detr --content own --class_loss bce --use_cpu"
    words += f" --general_points 10 --per_device_train_batch_size 2 --max_steps 7 --output_dir {folder / 'out'}"
    words += f" --config_name {QUICKSTART / 'student_config.json'} --teacher_model_name_or_path {teacher}"
    return [*words.split(), *more]


def answers(arguments: list[str]) -> Report:
    """What the doctor says of data and teacher, without a step."""
    report, parsed = Report(), distill.parse(arguments)
    splits = doctor_data.load_data(report, parsed)
    assert splits is not None
    trainer = doctor_pair.build_pair(report, parsed, splits, parsed.config.output_dir)
    doctor_teacher.check_teacher(report, trainer, splits, 32)
    return report


def said(report: Report, subject: str, status: str) -> str:
    """The texts of a subject, all of which have a status."""
    found = [finding for finding in report.findings if finding["subject"] == subject]
    assert {finding["status"] for finding in found} == {status}, found
    return "\n".join(finding["text"] for finding in found)


def changed_teacher(folder: Path, file: str, **changes: Any) -> Path:
    """A copy of the quickstart's teacher with other entries in one of its files."""
    shutil.copytree(QUICKSTART / "teacher", folder / "teacher")
    content = json.loads((folder / "teacher" / file).read_text())
    (folder / "teacher" / file).write_text(json.dumps(content | changes))
    return folder / "teacher"


def test_a_healthy_run_has_no_finding_and_leaves_nothing_behind(
    tmp_path: Path, shapes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--output_file", str(tmp_path / "found" / "doctor.json"), "--doctor_samples", "32"]
    assert doctor.main([*line(tmp_path, shapes), *own]) == 0
    found = json.loads((tmp_path / "found" / "doctor.json").read_text())
    assert {finding["status"] for finding in found["findings"]} == {"ok"}
    subjects = "environment train evaluation student teacher method frame preprocessing memory time terms disk"
    assert {finding["subject"] for finding in found["findings"]} == {*subjects.split(), "class order"}
    facts = found["facts"]
    assert facts["teacher"]["map"] > 0.5 and facts["teacher"]["images"] == 32
    assert facts["train"]["images"] == 8 and sum(facts["train"]["classes"].values()) == facts["train"]["boxes"]
    assert facts["time"]["steps"] == 7 and facts["time"]["seconds"] > 7 * facts["time"]["step_seconds"] > 0
    assert facts["memory"]["peak_gb"]["2"] > 0.1
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out.rstrip().endswith("0 problems and 0 warnings.")


# --- the order of the classes ----------------------------------------------------------------------------------------


def test_exchanged_names_are_named_and_the_class_map_that_is_offered_heals_them(tmp_path: Path, shapes: str) -> None:
    names = ["disc", "ring", "triangle", "cross", "box", "diamond"]  # box and ring exchanged
    ids = {name: i for i, name in enumerate(names)}
    teacher = changed_teacher(tmp_path, "config.json", id2label={str(i): n for n, i in ids.items()}, label2id=ids)
    text = said(answers(line(tmp_path, shapes, teacher=teacher)), "class order", "problem")
    assert "box 'ring'" in text and "ring 'box'" in text and "disc" not in text
    offered = text.splitlines()[-2:]
    assert yaml.safe_load("\n".join(offered)) == {"box": "ring", "ring": "box"}
    (tmp_path / "map.yaml").write_text("\n".join(offered))
    healed = answers(line(tmp_path, shapes, "--class_map", str(tmp_path / "map.yaml"), teacher=teacher))
    said(healed, "class order", "ok")


def test_classes_count_as_renamed_only_where_the_answers_are_plain() -> None:
    cycle = np.array([[0, 9, 1], [1, 0, 8], [9, 0, 0]])
    assert renamed(cycle, (0, 1, 2)) == {0: 1, 1: 2, 2: 0}
    assert with_renamed((0, 1, 2), {0: 1, 1: 2, 2: 0}) == [1, 2, 0]
    assert with_renamed((0, 1, 2), {0: 1}) == [1, None, 2]
    assert renamed(np.array([[9, 0, 1], [0, 9, 0], [8, 0, 3]]), (0, 1, 2)) == {}  # confused, not exchanged
    assert renamed(np.array([[0, 2, 0], [2, 0, 0], [0, 0, 9]]), (0, 1, 2)) == {}  # too few
    assert renamed(np.array([[0, 0, 7], [0, 0, 8], [0, 0, 9]]), (0, 1, None)) == {}  # it knows one word
    assert renamed(np.array([[5, 6, 0], [6, 5, 0], [0, 0, 9]]), (0, 1, 2)) == {}  # undecided
    assert renamed(np.array([[0, 7, 0], [9, 0, 0]]), (None, 0)) == {0: 1}  # a partner that the names did not tell


# --- the frame of the boxes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(shapes: str) -> list[Seen]:
    """What the quickstart's teacher finds in the evaluation images."""
    model = distill.AutoModelForObjectDetection.from_pretrained(QUICKSTART / "teacher", dtype=torch.float32)
    teacher = Teacher(model, class_names(model.config))
    return look(teacher, load_detection_split(shapes, "validation"), View((128, 128), NO_NORMALIZATION), 16)


@pytest.mark.parametrize("name", FRAMES)
def test_boxes_in_another_frame_are_recognised(name: str, tmp_path: Path, seen: list[Seen]) -> None:
    box, words = FRAMES[name]
    data = load_detection_split(write_shapes(tmp_path, box), "validation")
    read = [np.concatenate([r.boxes[:, :2], r.boxes[:, :2] + r.boxes[:, 2:]], 1) for r in data.records]
    named = [record.categories for record in data.records]  # boxes may have been dropped
    parts = zip(seen, read, named, strict=True)
    found = better_frame([replace(one, truth=boxes, labels=labels) for one, boxes, labels in parts])
    assert found is not None
    assert found[3] > found[2] + 0.25 and found[3] > 0.7
    if isinstance(words, tuple):
        scales = re.match(r"boxes of images ([\d.]+) times as wide and ([\d.]+) times as high", found[0])
        assert scales is not None and [float(s) for s in scales.groups()] == pytest.approx(words, abs=0.03)
    else:
        assert words in found[0]


def test_boxes_in_their_frame_are_left_alone(seen: list[Seen]) -> None:
    assert better_frame(seen) is None
    blind = [replace(one, boxes=one.boxes * 0.1) for one in seen]
    few = [replace(one, truth=one.truth[:0], labels=one.labels[:0]) for one in seen]
    assert better_frame(few) is None
    found = better_frame(blind)  # here it is the teacher's frame that is another
    assert found is not None and "times as wide" in found[0]


def test_corners_in_place_of_sizes_are_found_by_the_boxes_and_by_the_teacher(tmp_path: Path) -> None:
    report = answers(line(tmp_path, write_shapes(tmp_path / "data", FRAMES["corners"][0])))
    assert "reach out of their image or lie outside: they look like x_min" in said(report, "boxes", "problem")
    assert "read as x_min, y_min, x_max, y_max:" in said(report, "frame", "problem")
    said(report, "class order", "ok")  # looked at with the boxes in their place
    said(report, "preprocessing", "ok")


def test_boxes_betray_themselves(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "relative", FRAMES["relative"][0])
    fault = Statistics.of(load_detection_split(folder), "it").fault()
    assert fault is not None and "divided by the image's width and height: multiply" in fault
    folder = write_shapes(tmp_path / "corners", FRAMES["corners"][0])
    with mended_boxes() as mended:
        load_detection_split(folder)
    assert len(mended) == 1 and mended[0].fault() is not None
    assert mended[0].source.endswith("instances_validation.json") and mended[0].boxes > 100
    assert Mended("it", 100, 3, 40).fault() is None


def test_statistics_are_those_of_the_annotations(tmp_path: Path, shapes: str) -> None:
    data = load_detection_split(shapes)
    found, records = Statistics.of(data, "it"), list(data.records)
    assert (found.images, found.boxes, found.empty) == (32, sum(len(r.boxes) for r in records), 0)
    assert found.per_image[1] == max(len(r.boxes) for r in records)
    assert list(found.classes) == SHAPE_CLASSES and sum(found.classes.values()) == found.boxes
    assert 12 <= found.sides[0] <= found.sides[1] <= found.sides[2] <= 48
    assert 0.9 < min(found.reach) <= max(found.reach) <= 1 and found.fault() is None
    report = Report()
    doctor_data.describe(report, "train", found)
    assert [finding["status"] for finding in report.findings] == ["ok"]
    small = load_detection_split(write_shapes(tmp_path, FRAMES["half"][0]))
    doctor_data.describe(report, "small", Statistics.of(small, "it"))
    assert "are the annotations of smaller images?" in report.findings[-1]["text"]


# --- splits ----------------------------------------------------------------------------------------------------------


def test_a_missing_split_is_named_with_what_to_pass_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "data", splits=(("train2017", 4), ("holdout", 4), ("val2017", 4)))
    report = Report()
    splits = doctor_data.load_data(report, distill.parse(line(tmp_path, folder)))
    text = said(report, "splits", "problem")
    assert "has no split 'train': choose one of holdout, train2017, val2017." in text
    assert "Pass --dataset_train_split train2017 --dataset_eval_split val2017;" in text
    assert splits is not None and len(splits.train) == len(splits.eval) == 4
    given = ["--dataset_train_split", "train2017", "--dataset_eval_split", "val2017"]
    healthy = Report()
    doctor_data.load_data(healthy, distill.parse(line(tmp_path, folder, *given)))
    assert "splits" not in {finding["subject"] for finding in healthy.findings}


def test_a_single_split_is_not_enough_and_other_faults_keep_their_own_words(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "data", splits=(("train", 4),))
    assert offered_splits(folder, "train", None) == (["train"], "train", None)
    report = Report()
    assert doctor_data.load_data(report, distill.parse(line(tmp_path, folder))) is None
    assert "Training needs two splits" in said(report, "splits", "problem")
    report = Report()
    assert doctor_data.load_data(report, distill.parse(line(tmp_path, str(tmp_path / "none")))) is None
    assert "There is no data set" in said(report, "data set", "problem")
    whole = write_shapes(tmp_path / "whole", splits=(("train", 2), ("val", 2)))
    (Path(whole) / "train" / "1.png").unlink()
    report = Report()
    assert doctor_data.load_data(report, distill.parse(line(tmp_path, whole))) is None
    assert "1.png does not exist" in said(report, "data set", "problem")


# --- the teacher's image processor -----------------------------------------------------------------------------------


def test_a_wrong_normalisation_is_found_with_the_right_one(tmp_path: Path, shapes: str) -> None:
    teacher = changed_teacher(tmp_path, "preprocessor_config.json", do_normalize=True)
    text = said(answers(line(tmp_path, shapes, teacher=teacher)), "preprocessing", "problem")
    assert "shown images of 128x128 pixels, ImageNet's mean and standard deviation" in text
    assert text.endswith('no normalisation: set "do_normalize": false in the teacher\'s preprocessor_config.json.')


def test_a_wrong_size_is_found_with_the_processors_own(tmp_path: Path, shapes: str) -> None:
    report = answers(line(tmp_path, shapes, "--teacher_image_size", "64"))
    assert "pass --teacher_image_size 128x128" in said(report, "preprocessing", "problem")


def test_a_teacher_that_sees_nothing_is_a_problem_without_a_guess(tmp_path: Path, shapes: str) -> None:
    model = distill.build_student(str(QUICKSTART / "teacher_config.json"), SHAPE_CLASSES)
    shutil.copytree(QUICKSTART / "teacher", tmp_path / "teacher")
    model.save_pretrained(tmp_path / "teacher")
    report = answers(line(tmp_path, shapes, teacher=tmp_path / "teacher"))
    assert "finds next to nothing" in said(report, "preprocessing", "warning")
    said(report, "frame", "ok")
    said(report, "class order", "ok")
    assert any(f["status"] == "problem" and "0.05 is asked" in f["text"] for f in report.findings)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_batch_that_fits_lies_on_the_line_through_two_measured_ones() -> None:
    assert fitting_batch({2: 1.2, 4: 1.4}, 1.75) == 7
    assert fitting_batch({2: 1.2, 4: 1.4}, 1.05) == 0
    assert fitting_batch({4: 1.4, 1: 1.1}, 1.4) == 4


@pytest.fixture
def needy(tmp_path: Path, shapes: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trainer whose steps take 1 GiB and 0.1 for each image, and the sizes that were tried."""
    arguments = distill.parse(line(tmp_path, shapes, "--per_device_train_batch_size", "16"))
    trainer = distill.build_trainer(arguments)
    tried: list[int] = []

    class Memory:
        gib = 0.0

        def __init__(self, device: torch.device):
            pass

        def __enter__(self) -> Memory:
            return self

        def __exit__(self, *error: object) -> None:
            self.gib = 1 + 0.1 * tried[-1]

    def step(trainer: Any, size: int) -> dict[str, float]:
        tried.append(size)
        return {"read": 0.1, "step": 0.2}

    monkeypatch.setattr(doctor_step, "PeakMemory", Memory)
    monkeypatch.setattr(doctor_step, "one_step", step)
    return trainer, tried


@pytest.mark.parametrize(
    ("limit", "status", "words", "largest"),
    [
        (1.95, "problem", "16 does not fit: about 9 would fit, with --gradient_accumulation_steps", 8),
        (1.0, "problem", "not even 2 would", 2),
        (2.65, "warning", "less than a tenth is left", 16),
        (4.3, "ok", "33 would fit too", 16),
    ],
)
def test_too_little_memory_is_said_before_it_is_tried(
    needy: Any, limit: float, status: str, words: str, largest: int
) -> None:
    trainer, tried = needy
    report = Report()
    assert doctor_step.check_step(report, trainer, limit) == (status != "problem")
    assert words in said(report, "memory", status)
    assert max(tried) == largest
    if largest == 16:
        assert report.facts["time"]["seconds"] == pytest.approx(7 * 0.3)


def test_a_device_that_runs_out_is_a_problem_and_not_a_traceback(needy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, tried = needy
    harmless = doctor_step.one_step

    def step(trainer: Any, size: int) -> dict[str, float]:
        if size > 8:
            raise torch.OutOfMemoryError("no memory")
        return harmless(trainer, size)

    monkeypatch.setattr(doctor_step, "one_step", step)
    report = Report()
    assert not doctor_step.check_step(report, trainer, 100.0)
    assert "16 does not fit" in said(report, "memory", "problem") and max(tried) == 8


def test_a_real_step_needs_more_than_a_tiny_limit_and_the_status_says_so(tmp_path: Path, shapes: str) -> None:
    own = ["--memory_limit_gb", "0.05", "--doctor_samples", "1", "--output_file", str(tmp_path / "d.json")]
    assert doctor.main([*line(tmp_path, shapes, "--min_teacher_map", "0"), *own]) == 1
    found = json.loads((tmp_path / "d.json").read_text())
    (memory,) = [finding for finding in found["findings"] if finding["subject"] == "memory"]
    assert memory["status"] == "problem" and "--per_device_train_batch_size 2 does not fit" in memory["text"]
    assert all(peak > 0.05 for peak in found["facts"]["memory"]["peak_gb"].values())


def test_memory_that_is_taken_and_given_back_inside_is_seen() -> None:
    with diagnosis.PeakMemory(torch.device("cpu")) as before:
        torch.ones(1)
    with diagnosis.PeakMemory(torch.device("cpu")) as during:
        taken = [torch.ones(2**26) for _ in range(2)]  # 0.5 GiB
        del taken
    assert before.gib + 0.3 < during.gib < before.gib + 0.8


# --- the rest --------------------------------------------------------------------------------------------------------


def test_refusals_are_problems_in_their_own_words(tmp_path: Path, shapes: str, capsys: Any) -> None:
    assert doctor.main(line(tmp_path, shapes, "--teacher_model_name_or_path", str(tmp_path / "none"))) == 1
    assert "problem  models: " in capsys.readouterr().out
    assert doctor.main(["--output_dir", str(tmp_path)]) == 1
    assert "problem  arguments: Give the student either as --model_name_or_path" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--doctor_samples must be 1 or more, got 0"):
        doctor.main(["--doctor_samples", "0"])


def test_a_full_disk_is_a_problem(needy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = needy
    config = replace(trainer.args, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "a" / "b"))
    assert doctor_step.checkpoints_of(config, 7) == 4
    assert doctor_step.checkpoints_of(replace(config, save_total_limit=1), 7) == 2
    report = Report()
    doctor_step.check_disk(report, config, trainer)
    assert f"{tmp_path} has" in said(report, "disk", "ok")
    parameters = trainer.student.num_parameters()
    # Four checkpoints of weights and two moments, and the student at the end.
    assert report.facts["disk"]["needed_gb"] == pytest.approx(parameters * 4 * (4 * 3 + 1) / 2**30, rel=0.05)
    monkeypatch.setattr(doctor_step.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    report = Report()
    doctor_step.check_disk(report, config, trainer)
    assert "set --save_total_limit" in said(report, "disk", "problem")


def test_the_hub_is_asked_only_by_a_run_that_pushes(
    tmp_path: Path, shapes: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = ["--teacher_model_name_or_path", str(tmp_path / "none")]
    with HubServer(read_only=True) as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        doctor.main(line(tmp_path, shapes, *stops))
        assert not hub.requests and "Hub:" not in capsys.readouterr().out
        doctor.main(line(tmp_path, shapes, *stops, "--push_to_hub", "--hub_model_id", "user/it"))
        assert "problem  Hub: push_to_hub needs the right to write to user/it" in capsys.readouterr().out


def test_nothing_is_guessed_where_no_known_class_is_shown(seen: list[Seen]) -> None:
    empty = [replace(one, truth=one.truth[:0], labels=one.labels[:0]) for one in seen[:3]]
    assert math.isnan(diagnosis.map_of(empty, range(6), SHAPE_CLASSES))
