"""The help of commands: groups, each argument once, defaults that are true."""

import dataclasses
import re

import pytest
from transformers import TrainingArguments

from hf_detrkd.cli.arguments import parse
from hf_detrkd.cli.main import main
from hf_detrkd.methods import METHODS
from hf_detrkd.training.config import DistillationConfig


def shown(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 0
    return capsys.readouterr().out


def options_of(text: str) -> list[str]:
    return re.findall(r"^  (?:-h, )?--(\w+)", text, re.MULTILINE)


def test_groups_have_every_argument_once(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown("distill --method kd_detr,clockdistill --help", capsys)
    assert text.startswith("usage: hf-detrkd distill [--argument VALUE ...]\n")
    titles = re.findall(r"^(\w.*):$", text.partition("\noptions:")[2], re.MULTILINE)
    assert titles[:4] == ["data", "student", "run", "augmentation"]
    assert titles[4:7] == ["teacher and distillation", "method kd_detr", "method clockdistill"]
    assert titles[7:] == ["training (transformers.TrainingArguments)"]
    options = options_of(text)
    assert len(options) == len(set(options))
    own = set(DistillationConfig.__annotations__)
    for kind in (METHODS["kd_detr"].config_class, METHODS["clockdistill"].config_class):
        own |= {field.name for field in dataclasses.fields(kind)}
    named = set(re.findall(r"\w+", text.partition("which --help_all explains:")[2]))
    assert own - set(options) <= named
    theirs = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert theirs <= set(options) | named and not set(options) & named


def test_everything_is_explained_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of(shown("distill --help_all", capsys))
    assert {field.name for field in dataclasses.fields(TrainingArguments) if field.init} <= set(options)
    assert len(options) == len(set(options))


def test_defaults_are_those_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown("distill --help", capsys)
    run = parse(["--config_name", "x", "--dataset_name", "shapes", "--output_dir", "out"]).values
    for name in ("learning_rate", "num_train_epochs", "warmup_steps", "per_device_train_batch_size"):
        said = re.search(rf"^  --{name} \w+\s((?s:.*?))^  --", text, re.MULTILINE)
        assert said is not None
        default = re.search(r"Default:\s([\d.e-]+)\.", said[1])
        assert default is not None and float(default[1]) == run[name], said[0]


def test_a_required_argument_stands_in_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown("push --help", capsys).startswith("usage: hf-detrkd push DIR [--argument VALUE ...]\n")
    assert "--model_name_or_path PATH --input INPUT [--argument" in shown("predict --help", capsys)
