"""The card, from the files of a run alone: what was measured stands there, what was not is said so."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_detrkd import METHODS
from hf_detrkd.artifacts.model_card import write_card
from hf_detrkd.artifacts.run_folder import Run


ROW = {"map": 0.25, "map_50": 0.4, "map_75": 0.2, "parameters": 1234567, "classes": {"cat": 0.3, "a|b": None}}
LATENCY = {"1": {"median_ms": 4.25, "low_ms": 4.0, "high_ms": 4.5, "images_per_second": 235.0}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    facts = {
        "dataset_name": "cats",
        "hub_dataset": "somebody/cats",
        "eval_split": "val",
        "method": "kd_detr,clockdistill",
        "papers": [dataclasses.asdict(METHODS[name].paper) for name in ("kd_detr", "clockdistill")],
        "teacher": {"name": "somebody/teacher", "revision": "main"},
        "base_model": "somebody/start",
        "classes": ["cat", "a|b"],
    }
    models = {"teacher": ROW | {"map": 0.5}, "control": ROW | {"map": 0.125}, "distilled": ROW | {"latency": LATENCY}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    (tmp_path / "summary.json").write_text(json.dumps(models))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"output_dir": "/home/me/out", "learning_rate": 1e-4}))
    return tmp_path


def card_of(folder: Path, repo_id: str | None = None, **changes: object) -> ModelCard:
    """The card of the folder's run, with other facts."""
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | changes))
    return ModelCard.load(write_card(Run.read(folder), repo_id))


def test_metadata_hold_what_the_hub_shows(folder: Path) -> None:
    data = card_of(folder, "me/student", card={"license": "mit", "tags": ["tiny"]}, eval_images=7).data
    assert (data.base_model, data.datasets, data.license) == ("somebody/start", ["somebody/cats"], "mit")
    assert data.to_dict()["teacher"] == "somebody/teacher" and data.model_name == "student"
    assert data.tags == ["hf-detrkd", "object-detection", "knowledge-distillation", "kd_detr", "clockdistill", "tiny"]
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {"mAP": 0.25, "mAP50": 0.4, "mAP75": 0.2}
    assert {(r.dataset_type, r.dataset_name, r.dataset_split) for r in data.eval_results} == {
        ("somebody/cats", "cats", "val")
    }
    assert all(result.dataset_args == {"images": 7} for result in data.eval_results)


def test_the_body_compares_gives_classes_and_cites_every_method(folder: Path) -> None:
    text = card_of(folder).text
    gap = "not measured | not measured"
    assert f"| control | 12.5 | 40.0 | 20.0 | 1,234,567 | {gap} | {gap} |" in text
    assert (
        f"| distilled | 25.0 | 40.0 | 20.0 | 1,234,567 | not measured | 4.2 (4.0 to 4.5) | 235.0 | {gap[:12]} |"
        in text
    )
    assert r"| a\|b | not measured | not measured | not measured |" in text
    for name in ("kd_detr", "clockdistill"):
        assert METHODS[name].paper.citation in text and f"arxiv.org/abs/{METHODS[name].paper.arxiv}" in text
    assert "reaches 25.0 mAP; the same student trained without a teacher reaches 12.5" in text
    assert "| `output_dir` | `out` |" in text and "/home/me" not in text


TEACHERS = {
    "Distilled from `me/t` (revision `abc`) by": {"name": "me/t", "source": "hub", "revision": "abc"},
    "Distilled from `t` (a local folder) by": {"name": "t", "source": "folder"},
    "Distilled from `rt_detr` (passed as an object) by": {"name": "rt_detr", "source": "memory"},
}


@pytest.mark.parametrize("words", TEACHERS)
def test_a_teacher_has_a_revision_only_on_the_hub(folder: Path, words: str) -> None:
    card = card_of(folder, teacher={"revision": None} | TEACHERS[words])
    assert words in card.text
    assert card.data.to_dict().get("teacher_revision") == TEACHERS[words].get("revision")


def test_how_it_was_measured_and_trained_stands_beside_the_figures(folder: Path) -> None:
    models = json.loads((folder / "summary.json").read_text())
    for name, size in {"teacher": 800, "distilled": 640}.items():
        models[name] |= {"latency": LATENCY, "image_size": [size, size], "precision": "float32"}
    (folder / "summary.json").write_text(json.dumps(models))
    text = card_of(folder, device="a CPU", seed=3, batch_size=32, processes=4, mixed_precision="bf16").text
    assert "forward passes on a CPU, median and quartiles (teacher: 800 x 800 pixels, float32; distilled: 640" in text
    assert "seed 3, batches of 32 images, on 4 processes, in bf16" in text
    text = card_of(folder, arguments={"learning_rate": 1e-4, "hub_token": "x"}).text
    assert "| `learning_rate` | `0.0001` |" in text and "hub_token" not in text


def test_a_card_that_was_never_pushed_names_no_repository(folder: Path) -> None:
    card = card_of(folder, card={"title": "A nice name"})
    assert 'model="path/to/this/folder"' in card.text and card.text.lstrip().startswith("# A nice name")


def test_a_run_without_teacher_and_control_claims_neither(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps({"method": "none", "teacher": None}))
    (folder / "summary.json").write_text(json.dumps({"student": {"parameters": 7}}))
    card = card_of(folder)
    assert card.data.eval_results is None and "knowledge-distillation" not in card.data.tags
    assert "Trained without a teacher." in card.text
    assert "A control (the same student without a teacher) was not measured." in card.text
    assert "| student | not measured | not measured | not measured | 7 |" in card.text
    assert "forward passes" not in card.text


def test_pictures_are_shown_where_there_are_such_and_custom_code_is_asked_for(folder: Path) -> None:
    assert "curves.png" not in card_of(folder).text and "trust_remote_code" not in card_of(folder).text
    (folder / "curves.png").write_bytes(b"")
    (folder / "modeling_faster_rcnn.py").write_text("")
    text = card_of(folder, "me/student").text
    assert "](curves.png)" in text
    assert 'pipeline("object-detection", model="me/student", trust_remote_code=True)' in text


def test_a_folder_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no summary\.json"):
        Run.read(tmp_path)


def test_names_of_others_cannot_break_the_card(folder: Path) -> None:
    evil = "a|b\n# big [x](http://y) <script>`*"
    facts = json.loads((folder / "run.json").read_text()) | {"dataset_name": evil, "classes": [evil, "cat"]}
    facts["teacher"] = {"name": evil, "source": "folder", "revision": None}
    (folder / "run.json").write_text(json.dumps(facts))
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary.values():
        row["classes"] = {evil: 0.5, "cat": 0.1}
    (folder / "summary.json").write_text(json.dumps(summary))
    body = write_card(Run.read(folder)).read_text().split("---", 2)[2]
    assert r"a\|b \# big \[x\](http://y) \<script\>\`\*" in body
    assert "`a|b # big [x](http://y) <script>'*`" in body
    assert "\n# big" not in body and body.count("<script>") == body.count("`a|b # big [x](http://y) <script>'*`")
    rows = [line for line in body.splitlines() if line.startswith("| ") and "script" in line]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == len(summary) + 2 for row in rows)
