"""Answers as a data set repository: pushed, described, and trained from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_detrkd.answers import Manifest, StoredAnswers
from hf_detrkd.artifacts.answers_card import answers_card
from hf_detrkd.artifacts.hub.background_push import HubPush
from hf_detrkd.artifacts.hub.push_run import push_answers
from hf_detrkd.cli import push
from tests import ROOT
from tests.answers.stored import VIEWS, build, dataset, methods_of, stored, teacher_of
from tests.hub_server import HubServer


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HubPush, "waits", (0.1, 0.4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    teacher = teacher_of("rt_detr")
    stored(
        tmp_path / "answers", teacher, methods_of(build("rt_detr"), teacher, kd_detr={"general_points": 3}), dataset()
    )
    (tmp_path / "answers" / "teacher_results.json").write_text(json.dumps({"teacher_map": 0.5}))
    return tmp_path / "answers"


READ = """
import sys, torch
from hf_detrkd.answers import StoredAnswers
answers = StoredAnswers(sys.argv[1])
torch.save({image: answers.read(image, 2) for image in answers.image_ids.tolist()}, sys.argv[2])
"""


def read_elsewhere(hub: HubServer, name: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Reads answers in a process that takes the test's Hub for its own, and saves the rows of their last view."""
    command = [sys.executable, "-c", READ, name, str(tmp_path / "rows.pt")]
    environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_answers_are_pushed_with_a_card_and_read_from_there(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    push.main([str(folder), "--hub_model_id", "user/shapes-answers"])
    files = hub.repos["user/shapes-answers"].files()
    assert {name for name in files if name.endswith(".arrow")} == {file.name for file in folder.glob("*.arrow")}
    assert {"manifest.json", "teacher_results.json", "README.md"} < files.keys()
    card = files["README.md"].decode()
    assert "knowledge-distillation" in card.split("---")[1] and "n<1K" in card.split("---")[1]
    assert "--teacher_answers user/shapes-answers" in card and "| `layers/0/logits` | float32 | " in card
    kinds = [json.loads(e.body)["type"] for e in hub.exchanges if e.path == "/api/repos/create"]
    assert set(kinds) == {"dataset"}

    done = read_elsewhere(hub, "user/shapes-answers@main", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    here, there = StoredAnswers(folder), torch.load(tmp_path / "rows.pt")
    assert VIEWS == 3 and there.keys() == set(here.image_ids.tolist())
    for image, found in there.items():
        assert all(torch.equal(found[name], value) for name, value in here.read(image, 2).items())


def test_a_repository_that_is_not_there_is_one_sentence(hub: HubServer, tmp_path: Path) -> None:
    done = read_elsewhere(hub, "user/nothing", tmp_path)
    assert "must be a folder of hf-detrkd answer, or a data set repository of the Hub, but user/nothing" in done.stderr


def test_incomplete_answers_are_not_pushed(hub: HubServer, folder: Path) -> None:
    next(folder.glob("answers-*.arrow")).unlink()
    with pytest.raises(ValueError, match="files of answers in"):
        push_answers(folder, repo_id="user/shapes-answers")
    assert not hub.repos


def test_the_card_of_a_teacher_of_the_hub_links_to_it(folder: Path) -> None:
    manifest = Manifest.read(folder)
    manifest.teacher.update({"name": "someone/teacher", "source": "hub", "revision": "abc"})
    card = answers_card(manifest, "user/answers")
    assert "[someone/teacher](https://huggingface.co/someone/teacher)" in card and "| revision | abc |" in card
    assert "a teacher that is not on the Hub" in answers_card(Manifest.read(folder), "user/answers")
