"""Pushing, over the real client, to the Hub of the tests: what arrives, in which order, and what never does."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from hf_detrkd.artifacts.hub.background_push import HubPush
from hf_detrkd.artifacts.hub.files import STUDENT_FILES, Part
from hf_detrkd.artifacts.hub.push_run import push_run
from tests.artifacts.hub.folders import FILES, STUDENT, leftovers, pushed
from tests.hub_server import HubServer
from tests.runs import make_trainer


def test_a_push_brings_the_student_and_the_results_and_nothing_else(hub: HubServer, folder: Path) -> None:
    push = HubPush(folder, "student")
    push.check()
    assert push.repo_id == STUDENT  # the account's own namespace
    commit = pushed(push)
    repo = hub.repos[STUDENT]
    assert commit.oid == repo.head and repo.private
    assert set(repo.files()) - {".gitattributes"} == {"config.json", "model.safetensors", "README.md", "recipe.yaml"}
    assert repo.files()["model.safetensors"] == FILES["model.safetensors"].encode()
    assert yaml.safe_load(repo.files()["recipe.yaml"]) == {"dataset_name": "images", "learning_rate": 0.1}
    assert (folder / "recipe.yaml").read_text() == FILES["recipe.yaml"]
    assert not leftovers(folder)


def test_pushing_again_changes_nothing_and_sends_no_file(hub: HubServer, folder: Path) -> None:
    first = push_run(folder, repo_id=STUDENT)
    uploads = [request for request in hub.requests if request[0] == "PUT"]
    second = push_run(folder, repo_id=STUDENT)
    assert first.oid == second.oid == hub.repos[STUDENT].head
    assert [request for request in hub.requests if request[0] == "PUT"] == uploads


def test_a_public_repository_and_a_branch_are_made_where_they_are_asked_for(hub: HubServer, folder: Path) -> None:
    assert push_run(folder, repo_id=STUDENT, private=False, revision="trial") is not None
    repo = hub.repos[STUDENT]
    assert not repo.private
    assert "model.safetensors" not in repo.files()
    assert "model.safetensors" in repo.files("trial")


def test_uploads_come_in_their_order_however_slow(hub: HubServer, folder: Path) -> None:
    hub.fail("POST .*/preupload/", delay=2.0)  # the first
    push = HubPush(folder, STUDENT)
    for step in (1, 2):
        (folder / "config.json").write_text(f"step {step}")
        push.push(Part(folder, ["config.json"]), f"step {step}")
    assert push.finish() is not None
    assert [commit.message for commit in hub.repos[STUDENT].commits][-2:] == ["step 1", "step 2"]


def test_another_process_leaves_a_running_upload_alone(hub: HubServer, folder: Path) -> None:
    hub.fail("POST .*/preupload/", delay=2.0)
    push = HubPush(folder, STUDENT)
    push.push(Part(folder, STUDENT_FILES), "slow")
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = folder / leftovers(folder)[0].name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    left.mkdir()
    HubPush(folder, STUDENT).check()
    assert not left.exists() and len(leftovers(folder)) == 1
    assert push.finish() is not None


def test_a_run_that_did_not_end_is_refused_with_what_to_push(tmp_path: Path) -> None:
    make_trainer(tmp_path / "out", save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match=r"The run is not finished: push .*checkpoint-2, or resume the run\."):
        push_run(tmp_path / "out")


def test_an_upload_that_is_killed_leaves_the_old_commit(hub: HubServer, folder: Path, warnings: list) -> None:
    old = push_run(folder, repo_id=STUDENT).oid
    (folder / "model.safetensors").write_text("better" * 2000)
    hub.fail("PUT ", delay=30.0)
    push = HubPush(folder, STUDENT)
    push.push(Part(folder, STUDENT_FILES), "Killed")
    seen = len(hub.requests)
    while not any(method == "PUT" for method, *_ in hub.requests[seen - 1 :]):
        time.sleep(0.05)
    push._uploads[0].process.kill()
    assert push.finish() is None
    assert "the upload process exited with status -9" in warnings[0]
    assert hub.repos[STUDENT].head == old


def test_a_checkpoint_may_be_deleted_while_it_is_on_its_way(hub: HubServer, folder: Path) -> None:
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, checkpoint / name)
    hub.fail("POST .*/preupload/", delay=2.0)
    push = HubPush(folder, STUDENT)
    push.push(Part(checkpoint, STUDENT_FILES), "step 1")
    shutil.rmtree(checkpoint)
    assert push.finish().oid == hub.repos[STUDENT].head
    assert hub.repos[STUDENT].files()["model.safetensors"] == FILES["model.safetensors"].encode()
