"""Pushing, over the real client, to the Hub of the tests: what arrives, what never does, and what faults cost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from hf_detrkd.hub import HubPush
from hf_detrkd.hub_files import STAGE, STUDENT_FILES, Part, parts_of
from hf_detrkd.sharing import push_run
from tests.hub_server import HubServer
from tests.training import make_trainer


STUDENT = "user/student"
FILES = {
    "config.json": '{"model_type": "detr"}',
    "model.safetensors": "weights" * 1000,
    "README.md": "# A student\n",
    "recipe.yaml": "dataset_name: /home/somebody/images\nlearning_rate: 0.1\n",
    "optimizer.pt": "never",
    "training_args.bin": "never",
    "control/model.safetensors": "never",
    "events.out.tfevents": "never",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that processes started from here take for theirs."""
    with HubServer() as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            if name.startswith("HF_"):
                monkeypatch.setenv(name, value)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the package warns of."""
    said: list[str] = []
    monkeypatch.setattr("hf_detrkd.hub.logger.warning", said.append)
    return said


def pushed(push: HubPush) -> object:
    for part in parts_of(push.folder, None):
        push.push(part, "End of training")
    return push.finish()


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(f"{STAGE}*"))


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


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("POST .*/preupload/", {"status": 503, "times": 2}),
        ("POST .*/commit/", {"status": 429, "headers": {"Retry-After": "1"}}),
        ("POST .*/commit/", {"status": 409}),
        ("POST .*/commit/", {"status": 500}),
        ("PUT ", {"drop": True, "after_bytes": 1000}),
        ("POST .*/commit/", {"drop": True, "after_bytes": 50}),
        ("POST /api/repos/create", {"status": 502}),
    ],
    ids=["503", "429", "409", "500", "upload cut", "commit cut", "create 502"],
)
def test_what_passes_is_waited_for(hub: HubServer, folder: Path, warnings: list, pattern: str, fault: dict) -> None:
    pending = hub.fail(pattern, **fault)
    assert pushed(HubPush(folder, STUDENT)).oid == hub.repos[STUDENT].head
    assert pending.times == 0 and not warnings


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("POST .*/commit/", {"status": 401}),
        ("POST .*/preupload/", {"status": 403}),
        ("POST .*/info/lfs/objects/batch", {"status": 413}),
        ("PUT ", {"drop": True, "after_bytes": 1000}),
        ("POST .*/commit/", {"status": 503}),
        ("POST .*/commit/", {"delay": 60.0}),
    ],
    ids=["401", "403", "413", "always cut", "always 503", "hangs"],
)
def test_what_stays_is_one_warning_and_a_later_push_completes(
    hub: HubServer, folder: Path, warnings: list, pattern: str, fault: dict
) -> None:
    old = push_run(folder, repo_id=STUDENT).oid
    (folder / "model.safetensors").write_text("better" * 2000)
    pending = hub.fail(pattern, times=1000, **fault)
    started = time.monotonic()
    push = HubPush(folder, STUDENT, patience=8.0)
    assert pushed(push) is None
    assert time.monotonic() - started < 20
    assert len(warnings) == 1 and push.command in warnings[0]
    assert push.command.startswith(f"hf-detrkd push {folder} --hub_model_id {STUDENT}")
    assert hub.repos[STUDENT].head == old
    assert (folder / "model.safetensors").read_text() == "better" * 2000 and not leftovers(folder)
    pending.times = 0
    assert push_run(folder, repo_id=STUDENT).oid == hub.repos[STUDENT].head != old
    assert hub.repos[STUDENT].files()["model.safetensors"] == b"better" * 2000


def test_a_hub_that_is_down_is_a_warning_and_a_later_push_completes(
    hub: HubServer, folder: Path, warnings: list
) -> None:
    hub.stop()
    push = HubPush(folder, STUDENT, patience=4.0)
    assert not push.check()
    assert len(warnings) == 1 and "cannot be reached" in warnings[0]
    assert pushed(push) is None and len(warnings) == 2
    hub.start()
    assert push_run(folder, repo_id=STUDENT).oid == hub.repos[STUDENT].head


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_may_not_write_is_refused_before_anything_is_trained(
    hub: HubServer, folder: Path, status: int
) -> None:
    hub.fail("/auth-check/write|/repos/create", status=status, times=10)
    with pytest.raises(ValueError, match=r"push_to_hub needs the right to write to user/student.*hf auth login"):
        HubPush(folder, STUDENT).check()


@pytest.mark.parametrize("name", ["user/my run", "a--b", "x" * 120, "someone/student"])
def test_a_name_that_the_hub_cannot_take_is_refused_before_anything_is_trained(
    hub: HubServer, folder: Path, name: str
) -> None:
    for make in (True, False):
        with pytest.raises(ValueError, match=r"push_to_hub needs .* change hub_model_id"):
            HubPush(folder, name).check(make)
    assert not hub.repos


def test_to_ask_makes_no_repository(hub: HubServer, folder: Path, warnings: list) -> None:
    assert HubPush(folder, "student").check(make=False) and not hub.repos
    hub.stop()
    assert not HubPush(folder, "student", patience=4.0).check(make=False)
    hub.start()
    hub.read_only = True
    with pytest.raises(ValueError, match="the token may read, not write"):
        HubPush(folder, "student").check(make=False)


def test_a_refusal_of_the_storage_is_told_and_not_repeated(hub: HubServer, folder: Path, warnings: list) -> None:
    hub.fail("PUT ", status=403, times=1000)
    assert pushed(HubPush(folder, STUDENT)) is None
    assert "403" in warnings[0]
    assert sum(method == "PUT" for method, *_ in hub.requests) == 1


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


def test_a_later_push_brings_the_checkpoints_of_the_strategy_and_a_card_for_the_repository(
    hub: HubServer, tmp_path: Path
) -> None:
    trainer = train(tmp_path / "a run")
    trainer.save_model()
    trainer.create_model_card(model_name="A nice name")
    push_run(tmp_path / "a run", repo_id=STUDENT, strategy="checkpoint")
    files = hub.repos[STUDENT].files()
    assert "last-checkpoint/optimizer.pt" in files
    card = files["README.md"].decode()
    assert 'model="user/student"' in card and "# A nice name" in card
    assert HubPush(tmp_path / "a run", STUDENT).command.startswith(f"hf-detrkd push '{tmp_path}/a run' --hub_model_id")


def test_a_run_that_did_not_end_is_refused_with_what_to_push(tmp_path: Path) -> None:
    train(tmp_path / "out")
    with pytest.raises(ValueError, match=r"Its run did not end: push .*checkpoint-2, or resume it\."):
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
    assert "the upload ended with -9" in warnings[0]
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


# --- in the trainer --------------------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForObjectDetection.from_pretrained(folder).state_dict()


def train(folder: Path, **arguments: object) -> object:
    trainer = make_trainer(folder, method="kd_detr", save_strategy="steps", save_steps=1, **arguments)
    trainer.train()
    trainer.evaluate()
    return trainer


PUSHES = {"push_to_hub": True, "hub_model_id": "student", "hub_timeout": 60.0}


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_every_strategy_pushes_what_it_says(hub: HubServer, tmp_path: Path, strategy: str) -> None:
    trainer = train(tmp_path / "out", hub_strategy=strategy, hub_always_push=True, **PUSHES)
    commit = trainer.push_to_hub()
    repo = hub.repos[STUDENT]
    assert commit.oid == repo.head
    files, messages = repo.files(), [commit.message for commit in repo.commits]
    assert {"config.json", "model.safetensors", "README.md", "run.json", "summary.json"} <= set(files)
    assert ("Training in progress, step 1" in messages) == (strategy != "end")
    assert ("last-checkpoint/optimizer.pt" in files) == (strategy == "checkpoint")
    assert ("checkpoint-1/optimizer.pt" in files) == (strategy == "all_checkpoints")
    if strategy in ("every_save", "end"):
        assert not [name for name in files if "optimizer" in name or "training_args" in name or "/" in name]
    (tmp_path / "copy").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "copy" / name).write_bytes(files[name])
    expected = trainer.student.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "copy").items())


def test_a_hub_that_fails_all_the_time_changes_nothing_of_the_training(
    hub: HubServer, tmp_path: Path, warnings: list
) -> None:
    quiet = train(tmp_path / "quiet")
    hub.fail("/preupload/|/commit/", status=403, times=1000)
    trainer = train(tmp_path / "out", **PUSHES)
    assert trainer.push_to_hub() is None
    assert trainer.state.global_step == quiet.state.global_step == 2
    for name, value in quiet.student.state_dict().items():
        assert torch.equal(value, trainer.student.state_dict()[name]), name
    assert sum("The Hub did not take a checkpoint" in text for text in warnings) <= 1
    assert "hf-detrkd push" in warnings[-1]
    assert (tmp_path / "out" / "README.md").is_file() and (tmp_path / "out" / "model.safetensors").is_file()
    assert len(hub.repos[STUDENT].commits) == 1  # the empty repository


class Failing(transformers.TrainerCallback):
    """As trackio's, which goes to the Hub by itself."""

    def on_push_begin(self, *args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")


def test_a_callback_that_fails_at_a_push_stops_neither_training_nor_push(hub: HubServer, tmp_path: Path) -> None:
    trainer = train(tmp_path / "out", callbacks=[Failing()], **PUSHES)
    assert trainer.state.global_step == 2
    assert trainer.push_to_hub().oid == hub.repos[STUDENT].head


def test_a_resumed_run_goes_on_without_the_right_to_write(hub: HubServer, tmp_path: Path, caplog) -> None:
    train(tmp_path / "out")
    hub.fail("/auth-check/write|/repos/create", status=403, times=10)
    resumed = train(tmp_path / "out", max_steps=3, resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"), **PUSHES)
    assert resumed.state.global_step == 3


def test_only_the_process_that_shall_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path / "out")
    monkeypatch.setattr(type(trainer.args), "should_save", False)
    trainer.save_model()
    assert not list((tmp_path / "out").iterdir())


def test_the_card_of_a_plain_trainer_holds_its_last_evaluation(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", method="kd_detr")
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(license="apache-2.0", dataset="shapes", tags="shapes")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["distilled"]["map"] == metrics["eval_map"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in text and "- shapes" in text and "not measured" in text
