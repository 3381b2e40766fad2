"""Images that the doctor shows a teacher: sizes and normalisations."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

from hf_detrkd.cli.doctor import Seen, map_of
from hf_detrkd.data.shapes import SHAPE_CLASSES
from hf_detrkd.distillation.student import build_student
from tests.cli.doctor.runs import QUICKSTART, answers, changed_teacher, line, said


def test_a_wrong_normalisation_is_found_with_the_right_one(tmp_path: Path, shapes: str) -> None:
    teacher = changed_teacher(tmp_path, "preprocessor_config.json", do_normalize=True)
    text = said(answers(line(tmp_path, shapes, teacher=teacher)), "preprocessing", "problem")
    assert "with images of 128x128 pixels, ImageNet's mean and standard deviation" in text
    assert text.endswith('no normalisation: set "do_normalize": false in the teacher\'s preprocessor_config.json.')


def test_a_wrong_size_is_found_with_the_processors_own(tmp_path: Path, shapes: str) -> None:
    report = answers(line(tmp_path, shapes, "--teacher_image_size", "64"))
    assert "pass --teacher_image_size 128x128" in said(report, "preprocessing", "problem")


def test_a_teacher_that_sees_nothing_is_a_problem_without_a_guess(tmp_path: Path, shapes: str) -> None:
    model = build_student(str(QUICKSTART / "teacher_config.json"), SHAPE_CLASSES)
    shutil.copytree(QUICKSTART / "teacher", tmp_path / "teacher")
    model.save_pretrained(tmp_path / "teacher")
    report = answers(line(tmp_path, shapes, teacher=tmp_path / "teacher"))
    assert "detects almost nothing" in said(report, "preprocessing", "warning")
    said(report, "frame", "ok")
    said(report, "class order", "ok")
    assert any(f["status"] == "problem" and "below the minimum of 5." in f["text"] for f in report.findings)


def test_nothing_is_guessed_where_no_known_class_is_shown(seen: list[Seen]) -> None:
    empty = [replace(one, truth=one.truth[:0], labels=one.labels[:0]) for one in seen[:3]]
    assert math.isnan(map_of(empty, range(6), SHAPE_CLASSES))
