"""Pushes of a trainer: every strategy, and a Hub that never stops or changes the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from hf_detrkd.artifacts.hub.background_push import HubPush
from hf_detrkd.artifacts.hub.push_run import push_run
from hf_detrkd.artifacts.whole_checkpoints import fault_of
from hf_detrkd.cli import distill
from tests import tiny
from tests.artifacts.hub.folders import STUDENT
from tests.hub_server import HubServer
from tests.runs import make_trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForObjectDetection.from_pretrained(folder).state_dict()


def train(folder: Path, **arguments: object) -> object:
    trainer = make_trainer(folder, method="kd_detr", save_strategy="steps", save_steps=1, **arguments)
    trainer.train()
    trainer.evaluate()
    return trainer


PUSHES = {"push_to_hub": True, "hub_model_id": "student", "hub_timeout": 60.0}


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
    found = trainer.student.state_dict()
    for name, value in quiet.student.state_dict().items():
        assert torch.equal(value, found[name]), name
    assert sum("A checkpoint was not pushed to the Hub" in text for text in warnings) <= 1
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


STUDENT_ON_THE_HUB = {"config.json", "model.safetensors", "preprocessor_config.json"}
RUN_ON_THE_HUB = {"README.md", "run.json", "summary.json"}
RESUMING = {
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json"),
    *("distillation/method.json", "distillation/method.safetensors"),
}


@pytest.mark.parametrize("strategy", ["end", "checkpoint", "all_checkpoints"])
def test_a_push_holds_exactly_this_whatever_lies_beside_it(hub: HubServer, tmp_path: Path, strategy: str) -> None:
    """Secrets, hidden files and links are planted in every folder."""
    folder = tmp_path / "out"
    trainer = train(folder)
    trainer.save_model()
    trainer.create_model_card()
    secret = tmp_path / "id_rsa"
    secret.write_text("a key")
    for place in (folder, folder / "checkpoint-1", folder / "checkpoint-2", folder / "checkpoint-2" / "distillation"):
        (place / ".env").write_text("TOKEN=1")
        (place / "notes.txt").write_text("mine")
        (place / "notes.png").symlink_to(secret)
        (place / "other.safetensors").symlink_to(secret)
        (place / "modeling_mine.py").symlink_to(secret)
        (place / "optimizer.pt.json").write_text("{}")
        (place / "teacher.safetensors").write_text("not mine")
    push_run(folder, repo_id=STUDENT, strategy=strategy)
    kept = {"end": [], "checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-1", "checkpoint-2"]}
    resuming = STUDENT_ON_THE_HUB | RESUMING
    wanted = STUDENT_ON_THE_HUB | RUN_ON_THE_HUB | {f"{part}/{name}" for part in kept[strategy] for name in resuming}
    names = set(hub.repos[STUDENT].files()) - {".gitattributes"}
    pictures = {name for name in names if name.endswith(".png")}
    assert names - pictures - {"all_results.json", "precision.json", "teacher_results.json"} == wanted
    assert "notes.png" not in pictures and not any("/" in name for name in pictures)


def test_a_later_start_of_a_finished_run_leaves_the_weights_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "student.json").write_text(json.dumps(tiny.config("rt_detr").to_dict()))
    words = f"--config_name {tmp_path}/student.json --image_size 64 --max_train_samples 4 --max_eval_samples 4"
    words += f" --output_dir {tmp_path}/out --max_steps 2 --save_steps 1 --per_device_train_batch_size 2 --use_cpu"
    words += " --disable_tqdm true --measure_efficiency false --ema_decay 0.5 --learning_rate 0.01"
    words += f" --dataset_name shapes --report_to none --push_to_hub true --hub_model_id {STUDENT}"
    distill.main(words.split())
    before = hub.repos[STUDENT].files()
    distill.main([*words.split(), "--resume_from_checkpoint", "true"])
    after = hub.repos[STUDENT].files()
    assert sorted(before) == sorted(after)
    saved = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert before["model.safetensors"] == after["model.safetensors"] == saved
    figures = [yaml.safe_load(files["README.md"].decode().split("---")[1])["model-index"] for files in (before, after)]
    assert figures[0] == figures[1]


def test_a_checkpoint_from_the_hub_is_whole(hub: HubServer, tmp_path: Path) -> None:
    trainer = train(tmp_path / "out")
    trainer.save_model()
    push_run(tmp_path / "out", repo_id=STUDENT, strategy="checkpoint")
    for name, content in hub.repos[STUDENT].files().items():
        if name.startswith("last-checkpoint/"):
            file = tmp_path / "checkpoint-2" / name.partition("/")[2]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    assert fault_of(tmp_path / "checkpoint-2") is None
