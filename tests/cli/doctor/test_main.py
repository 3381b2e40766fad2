"""The whole doctor: a healthy run, and what stops it before it can look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_detrkd.cli.doctor import main as doctor
from tests.cli.doctor.runs import IMAGES, answers, changed_teacher, line, said
from tests.hub_server import HubServer


def test_a_healthy_run_has_no_finding_and_leaves_nothing_behind(
    tmp_path: Path, shapes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--output_file", str(tmp_path / "found" / "doctor.json"), "--doctor_samples", str(IMAGES)]
    assert doctor.main([*line(tmp_path, shapes), *own]) == 0
    found = json.loads((tmp_path / "found" / "doctor.json").read_text())
    assert {finding["status"] for finding in found["findings"]} == {"ok"}
    subjects = "environment train evaluation student teacher method frame preprocessing memory time terms disk"
    assert {finding["subject"] for finding in found["findings"]} == {*subjects.split(), "class order", "output folder"}
    facts = found["facts"]
    assert facts["teacher"]["map"] > 0.5 and facts["teacher"]["images"] == IMAGES
    assert facts["train"]["images"] == 8 and sum(facts["train"]["classes"].values()) == facts["train"]["boxes"]
    assert facts["time"]["steps"] == 7 and facts["time"]["seconds"] > 7 * facts["time"]["step_seconds"] > 0
    assert facts["memory"]["peak_gb"]["2"] > 0.1
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out.rstrip().endswith("0 problems and 0 warnings.")


def test_refusals_are_problems_in_their_own_words(tmp_path: Path, shapes: str, capsys: Any) -> None:
    assert doctor.main(line(tmp_path, shapes, "--teacher_model_name_or_path", str(tmp_path / "none"))) == 1
    assert "problem  models: " in capsys.readouterr().out
    assert doctor.main(["--output_dir", str(tmp_path)]) == 1
    assert "problem  data set: Say which data set: --dataset_name path/to/folder" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--doctor_samples must be 1 or more, got 0"):
        doctor.main(["--doctor_samples", "0"])


def test_an_output_folder_that_holds_the_teacher_is_a_problem(tmp_path: Path, shapes: str, capsys: Any) -> None:
    teacher = changed_teacher(tmp_path, "config.json")
    assert doctor.main(line(tmp_path, shapes, "--output_dir", str(teacher), teacher=teacher)) == 1
    assert "problem  output folder: output_dir must not be the folder of the teacher" in capsys.readouterr().out


def test_an_output_folder_that_the_run_would_refuse_is_a_problem(tmp_path: Path, shapes: str, capsys: Any) -> None:
    stops = ["--teacher_model_name_or_path", str(tmp_path / "none")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "all_results.json").write_text("{}")
    doctor.main(line(tmp_path, shapes, *stops))
    assert "problem  output folder: " in (said := capsys.readouterr().out) and "holds a finished run" in said
    for word in ("--overwrite_output_dir", "--resume_from_checkpoint=true"):
        doctor.main(line(tmp_path, shapes, *stops, word))
        assert "ok       output folder: " in capsys.readouterr().out


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
        assert "problem  Hub: push_to_hub needs write access to user/it" in capsys.readouterr().out
        hub.read_only = False
        doctor.main(line(tmp_path, shapes, *stops, "--push_to_hub", "--hub_model_id", "user/it"))
        assert "ok       Hub: this run may push to user/it." in capsys.readouterr().out
        assert not hub.repos  # it asks and makes nothing
        hub.stop()
        doctor.main(line(tmp_path, shapes, *stops, "--push_to_hub", "--hub_timeout", "3"))
        assert "warning  Hub: it does not respond now" in capsys.readouterr().out


def test_a_teacher_whose_own_size_keeps_the_aspect_ratio_is_asked_image_by_image(tmp_path: Path, shapes: str) -> None:
    size = {"shortest_edge": 128, "longest_edge": 256}
    teacher = changed_teacher(tmp_path, "preprocessor_config.json", size=size)
    report = answers(line(tmp_path, shapes, teacher=teacher))
    said(report, "preprocessing", "ok")


def test_what_the_teacher_refuses_is_a_problem_and_not_a_traceback(
    tmp_path: Path, shapes: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise ValueError("rt_detr sees padding as image")

    monkeypatch.setattr(doctor, "check_teacher", refuse)
    assert doctor.main(line(tmp_path, shapes)) == 1
    assert "problem  teacher: rt_detr sees padding as image" in capsys.readouterr().out


def test_what_is_no_number_is_null_in_the_file() -> None:
    facts = {"map": float("nan"), "views": [{"map": 0.5}, {"map": float("inf")}]}
    assert doctor.as_json(facts) == {"map": None, "views": [{"map": 0.5}, {"map": None}]}
