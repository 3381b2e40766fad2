"""Neither a secret nor a path of the machine is in what leaves it, however they are written."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from hf_detrkd import DistillationConfig
from hf_detrkd.artifacts.redaction import forget_machine, hidden, is_secret, portable, portable_command, under_home


TOKEN = "hf_" + "q7Zk" * 8


def test_arguments_leave_the_machine_without_tokens_and_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = {"hub_token": TOKEN, "data": "/home/me/cats", "list": ["~/a", "b"], "id": "me/student", "rate": 0.1}
    assert portable(given) == {"data": "cats", "list": ["a", "b"], "id": "me/student", "rate": 0.1}
    assert under_home({"data": "/home/me/cats", "other": "/home/meadow", "x": {"api_key": "y"}}) == {
        "data": "~/cats",
        "other": "/home/meadow",
        "x": {},
    }


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", "abc"],
        ["--hub-token", "abc"],
        ["--hub-token=abc"],
        ["--wandb_api_key", "abc"],
        ["--wandb-api-key=abc"],
        ["--anything", TOKEN],
        ["--dataset_name", "https://me:abc@host/data"],
        ["--dataset_name", "/home/abc/data"],
        ["--dataset_name=file:///home/abc/data"],
        ["--dataset_name", "C:\\Users\\abc\\data"],
    ],
)
def test_a_command_keeps_what_is_harmless_alone(words: list[str]) -> None:
    said = portable_command(["run", *words, "--out", "a b", "--seed", "1"])
    assert said.startswith("run") and said.endswith("--out 'a b' --seed 1")
    assert "abc" not in said and TOKEN not in said


def test_a_switch_that_follows_a_secret_without_value_stays() -> None:
    assert portable_command(["run", "--hub_token", "--bf16"]) == "run --bf16"
    assert not is_secret("include_num_input_tokens_seen") and is_secret("--HUB-TOKEN")


def test_tokens_of_the_environment_are_hidden_whatever_they_look_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "quite-ordinary")
    assert hidden("a quite-ordinary text") == "a (hidden) text"
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "dummy")
    assert hidden("a dummy text") == "a dummy text"


def test_trackers_get_arguments_without_secrets_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = DistillationConfig(str(tmp_path / "out"), hub_token=TOKEN, use_cpu=True)
    assert config.to_dict()["output_dir"] == "~/out" and "hub_token" not in config.to_dict()
    assert str(tmp_path) not in config.to_json_string() and config.output_dir == str(tmp_path / "out")
    assert DistillationConfig(output_dir=config.to_dict()["output_dir"], use_cpu=True).output_dir == (
        config.output_dir
    )


@pytest.mark.parametrize(
    ("path", "kept"), [("/home/me/out/checkpoint-2", None), ("out/checkpoint-2", "out/checkpoint-2"), (None, None)]
)
def test_a_saved_state_forgets_absolute_paths(tmp_path: Path, path: str | None, kept: str | None) -> None:
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps({"best_model_checkpoint": path, "best_global_step": 2}))
    forget_machine(file)
    assert json.loads(file.read_text()) == {"best_model_checkpoint": kept, "best_global_step": 2}
    assert [one.name for one in tmp_path.iterdir()] == ["trainer_state.json"]
    forget_machine(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "text",
    [
        "AWS_SECRET_ACCESS_KEY=abcdefgh123",
        "aws_secret_access_key: 'abcdefgh123'",
        "Authorization: Bearer abcdefgh123",
        "https://blob.host/data?sv=2&sig=abcdefgh123&se=3",
        "https://bucket.host/x?X-Amz-Signature=abcdefgh123",
        "https://user:abcdefgh123/more@host/data",
        "--wandb-api-key abcdefgh123",
        '{"hub_token": "abcdefgh123"}',
        "AccountKey=abcdefgh123==",
    ],
)
def test_secrets_are_hidden_however_they_are_written(text: str) -> None:
    assert "abcdefgh123" not in hidden(text) and "hidden" in hidden(text) + "hidden" * text.startswith("https://user")


@pytest.mark.parametrize(
    "text",
    [
        "the secret sauce of a password manager",
        "tokens seen: 12 thousand words",
        "https://host:8080/a/b@main/c",
        "image_token_index is a name",
        "a basic method and a bearer of news",
    ],
)
def test_harmless_prose_stays(text: str) -> None:
    assert hidden(text) == text


def test_long_words_cost_no_time() -> None:
    """Sixteen thousand letters took most of a minute when every letter was a place to start."""
    for text in (
        "a" * 200_000,
        "-" * 200_000,
        "a-" * 100_000,
        "/a" * 50_000,
        "?" * 100_000,
        "://" * 60_000,
        "tokentoken" * 9000,
    ):
        started = time.perf_counter()
        portable(text)
        assert time.perf_counter() - started < 5, text[:10]
