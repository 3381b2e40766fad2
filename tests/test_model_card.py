"""The card, from the files of a run alone: what was measured stands there, what was not is said so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_detrkd import METHODS
from hf_detrkd.model_card import write_card
from hf_detrkd.run_files import Run, portable, portable_command, under_home


ROW = {"map": 0.25, "map_50": 0.4, "map_75": 0.2, "parameters": 1234567, "classes": {"cat": 0.3, "a|b": None}}
LATENCY = {"1": {"median_ms": 4.25, "low_ms": 4.0, "high_ms": 4.5, "images_per_second": 235.0}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    facts = {
        "dataset_name": "cats",
        "hub_dataset": "somebody/cats",
        "eval_split": "val",
        "method": "kd_detr,clockdistill",
        "teacher": {"name": "somebody/teacher", "revision": "main"},
        "base_model": "somebody/start",
        "classes": ["cat", "a|b"],
    }
    models = {"teacher": ROW | {"map": 0.5}, "control": ROW | {"map": 0.125}, "distilled": ROW | {"latency": LATENCY}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    (tmp_path / "summary.json").write_text(json.dumps(models))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"output_dir": "/home/me/out", "learning_rate": 1e-4}))
    return tmp_path


def card_of(folder: Path, **options: object) -> ModelCard:
    return ModelCard.load(write_card(Run.read(folder), **options))


def test_metadata_hold_what_the_hub_shows(folder: Path) -> None:
    data = card_of(folder, repo_id="me/student", license="mit", tags=["tiny"]).data
    assert (data.base_model, data.datasets, data.license) == ("somebody/start", ["somebody/cats"], "mit")
    assert data.to_dict()["teacher"] == "somebody/teacher" and data.model_name == "student"
    assert data.tags == ["hf-detrkd", "object-detection", "knowledge-distillation", "kd_detr", "clockdistill", "tiny"]
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {"mAP": 0.25, "mAP50": 0.4, "mAP75": 0.2}
    assert {(r.dataset_type, r.dataset_name, r.dataset_split) for r in data.eval_results} == {
        ("somebody/cats", "cats", "val")
    }


def test_the_body_compares_gives_classes_and_cites_every_method(folder: Path) -> None:
    text = card_of(folder).text
    assert "| control | 12.5 | 40.0 | 20.0 | 1,234,567 | not measured | not measured | not measured |" in text
    assert "| distilled | 25.0 | 40.0 | 20.0 | 1,234,567 | not measured | 4.2 (4.0 to 4.5) | not measured |" in text
    assert r"| a\|b | not measured | not measured | not measured |" in text
    for name in ("kd_detr", "clockdistill"):
        assert METHODS[name].paper.citation in text and f"arxiv.org/abs/{METHODS[name].paper.arxiv}" in text
    assert "reaches 25.0 mAP, where the same student without a teacher reaches 12.5" in text
    assert "| `output_dir` | `out` |" in text and "/home/me" not in text


def test_a_run_without_teacher_and_control_claims_neither(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps({"method": "none", "teacher": None}))
    (folder / "summary.json").write_text(json.dumps({"student": {"parameters": 7}}))
    card = card_of(folder)
    assert card.data.eval_results is None and "knowledge-distillation" not in card.data.tags
    assert "Trained without a teacher." in card.text
    assert "A control, the same student without a teacher, was not measured." in card.text
    assert "| student | not measured | not measured | not measured | 7 |" in card.text


def test_pictures_are_shown_where_there_are_such_and_custom_code_is_asked_for(folder: Path) -> None:
    assert "curves.png" not in card_of(folder).text and "trust_remote_code" not in card_of(folder).text
    (folder / "curves.png").write_bytes(b"")
    (folder / "modeling_faster_rcnn.py").write_text("")
    text = card_of(folder, repo_id="me/student").text
    assert "](curves.png)" in text
    assert 'pipeline("object-detection", model="me/student", trust_remote_code=True)' in text


def test_a_folder_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no summary\.json"):
        Run.read(tmp_path)


def test_arguments_leave_the_machine_without_tokens_and_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = {"hub_token": "hf_x", "data": "/home/me/cats", "list": ["~/a", "b"], "id": "me/student", "rate": 0.1}
    assert portable(given) == {"data": "cats", "list": ["a", "b"], "id": "me/student", "rate": 0.1}
    words = ["run", "--hub_token", "hf_x", "--data=/home/me/cats", "--hub_token=hf_x", "--out", "/tmp/a b"]
    assert portable_command(words) == "run --data=cats --out 'a b'"
    assert under_home({"data": "/home/me/cats", "other": "/home/meadow"}) == {
        "data": "~/cats",
        "other": "/home/meadow",
    }
