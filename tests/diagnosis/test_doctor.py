"""The whole doctor: a healthy run, and what stops it before it can look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import doctor
import pytest

from tests.diagnosis.runs import IMAGES, line
from tests.hub_server import HubServer


def test_a_healthy_run_has_no_finding_and_leaves_nothing_behind(
    tmp_path: Path, shapes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--output_file", str(tmp_path / "found" / "doctor.json"), "--doctor_samples", str(IMAGES)]
    assert doctor.main([*line(tmp_path, shapes), *own]) == 0
    found = json.loads((tmp_path / "found" / "doctor.json").read_text())
    assert {finding["status"] for finding in found["findings"]} == {"ok"}
    subjects = "environment train evaluation student teacher method frame preprocessing memory time terms disk"
    assert {finding["subject"] for finding in found["findings"]} == {*subjects.split(), "class order"}
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
    assert "problem  arguments: Give the student either as --model_name_or_path" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--doctor_samples must be 1 or more, got 0"):
        doctor.main(["--doctor_samples", "0"])


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
