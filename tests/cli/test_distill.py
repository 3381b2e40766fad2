"""`scripts/distill.py` as its users start it."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from hf_detrkd import METHODS
from hf_detrkd.artifacts.run_folder import write_recipe
from hf_detrkd.cli import arguments as distill_arguments
from hf_detrkd.cli import distill, evaluate, recipes, run_setup
from hf_detrkd.cli.launching import check_processes
from hf_detrkd.data import parse_image_size
from hf_detrkd.evaluation.efficiency import measure_efficiency
from hf_detrkd.methods import CLoCKDistillConfig, KDDETRConfig
from hf_detrkd.training import finish as finishing
from tests import ROOT, tiny
from tests.data.layouts.conftest import Files
from tests.data.layouts.writers import write_coco
from tests.processes import finish, start
from tests.runs import assert_close


RECIPES = [
    ROOT / "scripts" / "recipes" / f"{name}.yaml" for name in ("quickstart", "quickstart_live", "quickstart_teacher")
]


def distill_quickly(argv: list[str]) -> None:
    """A run whose latencies are measured for an instant; `accelerate launch` is tested with the push."""
    finishing.measure_efficiency = partial(measure_efficiency, seconds=0.05)
    distill.main(argv)


def test_a_recipe_trains_control_and_student_and_the_command_line_wins(tmp_path: Path, shapes_teacher: str) -> None:
    (tmp_path / "student.json").write_text(json.dumps(tiny.config("rt_detr").to_dict()))
    recipe = {
        "config_name": str(tmp_path / "student.json"),
        "teacher_model_name_or_path": shapes_teacher,
        "method": "kd_detr",
        "general_points": 20,
        "image_size": 64,
        "dataset_name": "shapes",
        "max_train_samples": 8,
        "max_eval_samples": 4,
        "max_steps": 50,
        "per_device_train_batch_size": 2,
        "learning_rate": "1e-4",
        "loss_weights": {"kd_detr_class": 0.5},
        "run_control": True,
        "min_teacher_map": 0,  # the teacher is random
        "output_dir": str(tmp_path / "out"),
        "report_to": "none",
        "save_strategy": False,  # what YAML makes of a bare `no`
        "logging_steps": 1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    log = tmp_path / "log.txt"
    words = ["--config", str(tmp_path / "recipe.yaml"), "--max_steps", "2", "--use_cpu"]
    printed = finish(start(distill_quickly, (words,), log), log)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary) == ["teacher", "control", "distilled"]
    figures = {"map", "map_50", "map_75", "parameters", "seconds_per_step", "classes", "gflops", "latency"}
    figures |= {"image_size", "precision"}
    assert all(set(row) == figures for row in summary.values())
    assert summary["teacher"]["gflops"] > summary["control"]["gflops"] == summary["distilled"]["gflops"] > 0
    assert summary["teacher"]["parameters"] > summary["control"]["parameters"] == summary["distilled"]["parameters"]
    assert summary["control"]["seconds_per_step"] > 0
    assert "mAP50" in printed
    alone = [*words, "--run_control", "false", "--output_dir", str(tmp_path / "alone")]
    finish(start(distill_quickly, (alone,), log), log)
    students = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "alone")]
    assert_close(*students, 0.0)  # whether or not a control was trained before it
    assert "distilled" in printed
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert any("kd_detr_class_specific" in entry for entry in state["log_history"])
    assert "eval_map_50" in json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert Image.open(tmp_path / "out" / "predictions.png").width > 1000
    for name in ("README.md", "report.html", "curves.png", "per_class.png", "pr_curves.png", "run.json"):
        assert (tmp_path / "out" / name).stat().st_size > 500, name
    assert (tmp_path / "out" / "control" / "model.safetensors").is_file()
    again = distill_arguments.parse(["--config", str(tmp_path / "out" / "recipe.yaml")])
    assert again.recipe == distill_arguments.parse(words).recipe


def test_a_run_that_had_ended_is_evaluated_and_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "student.json").write_text(json.dumps(tiny.config("rt_detr").to_dict()))
    words = (
        f"--config_name {tmp_path}/student.json --image_size 64 --max_train_samples 4 --max_eval_samples 4 --use_cpu"
    )
    words += f" --output_dir {tmp_path}/out --max_steps 2 --save_steps 1 --per_device_train_batch_size 2"
    words += " --disable_tqdm true --measure_efficiency false --dataset_name shapes"
    distill.main(words.split())
    before = json.loads((tmp_path / "out" / "all_results.json").read_text())
    distill.main([*words.split(), "--resume_from_checkpoint", "true"])
    after = json.loads((tmp_path / "out" / "all_results.json").read_text())
    same = ("eval_map", "train_seconds_per_step", "train_loss")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 2
    command = json.loads((tmp_path / "out" / "run.json").read_text())["command"]
    assert "--max_steps 2" in command and "resume" not in command
    capsys.readouterr()
    distill.main([*words.split(), "--resume_from_checkpoint", "true", "--max_steps", "3"])
    assert f"Going on from {tmp_path}/out/checkpoint-2.\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 3


def test_a_finished_run_with_an_average_is_resumed_with_the_averaged_student(tmp_path: Path) -> None:
    """A later start evaluates and saves the average that was trained, not the average of a new run."""
    (tmp_path / "student.json").write_text(json.dumps(tiny.config("rt_detr").to_dict()))
    words = f"--config_name {tmp_path}/student.json --image_size 64 --max_train_samples 4 --max_eval_samples 4"
    words += f" --output_dir {tmp_path}/out --max_steps 2 --save_steps 1 --per_device_train_batch_size 2 --use_cpu"
    words += (
        " --disable_tqdm true --measure_efficiency false --ema_decay 0.5 --learning_rate 0.01 --dataset_name shapes"
    )
    distill.main(words.split())
    before = json.loads((tmp_path / "out" / "all_results.json").read_text())
    weights = load_file(tmp_path / "out" / "model.safetensors")
    arguments = distill_arguments.parse([*words.split(), "--resume_from_checkpoint", "true"])
    trainer = run_setup.build_trainer(arguments)
    distill.train(trainer)
    after = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert after["eval_loss"] == before["eval_loss"]
    trainer.save_model()  # as a push does
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in weights.items())


@pytest.mark.parametrize("argument", ["model_name_or_path", "teacher_model_name_or_path", "config_name"])
def test_a_run_does_not_overwrite_the_models_that_it_loads(tmp_path: Path, shapes_teacher: str, argument: str) -> None:
    models = {"teacher_model_name_or_path": shapes_teacher, "method": "kd_detr"}
    models |= {"config_name": "student.json"} if argument.startswith("teacher") else {argument: shapes_teacher}
    words = [word for name, value in models.items() for word in (f"--{name}", value)]
    (tmp_path / "link").symlink_to(shapes_teacher)
    with pytest.raises(ValueError, match=r"output_dir must not be the folder of the .*: the run would overwrite it"):
        distill.main([*words, "--output_dir", str(tmp_path / "link"), "--use_cpu"])


def test_several_processes_on_the_cpu_that_accelerate_does_not_start_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}.items():  # as accelerate sets them
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for command in (distill, evaluate):
        with pytest.raises(ValueError, match="asked for several processes on the CPU, but --cpu starts only one"):
            command.main(["--output_dir", str(tmp_path)])
    check_processes({"ACCELERATE_USE_CPU": "True"})
    check_processes({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "OMPI_COMM_WORLD_SIZE": "2"})
    check_processes({"ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "127.0.0.1"})


def test_a_dry_run_prints_every_argument_as_a_recipe_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(RECIPES[0]), "--max_steps", "7", "--hub_token", "hf_secret"]
    distill.main([*arguments, "--output_dir", str(tmp_path / "out"), "--dry_run"])
    printed = capsys.readouterr().out
    recipe = yaml.safe_load(printed)
    assert (recipe["max_steps"], recipe["answers_form"], recipe["method"]) == (7, "moved", "detrdistill")
    assert recipe["hub_strategy"] == "every_save" and "hf_secret" not in printed
    assert not (tmp_path / "out").exists()
    (tmp_path / "recipe.yaml").write_text(printed)
    again = distill_arguments.parse(["--config", str(tmp_path / "recipe.yaml")])
    assert again.methods == distill_arguments.parse(arguments).methods and not again.script.dry_run
    assert distill_arguments.resolved(again) == recipe and recipe["run_name"] == "out"


def test_paths_of_the_home_folder_are_written_with_a_tilde_and_read_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_recipe(tmp_path / "out", {"dataset_name": str(tmp_path / "images"), "hub_token": "secret", "seed": 1})
    assert (tmp_path / "out" / "recipe.yaml").read_text() == "dataset_name: ~/images\nseed: 1\n"
    assert distill_arguments.read_recipe(str(tmp_path / "out" / "recipe.yaml"))["dataset_name"] == str(
        tmp_path / "images"
    )


def test_the_control_of_a_recipe_is_one_word(tmp_path: Path) -> None:
    recipe = {"config_name": "x", "method": "kd_detr", "general_points": 20, "output_dir": str(tmp_path)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = distill_arguments.parse(["--config", str(tmp_path / "recipe.yaml"), "--method", "none"])
    assert (found.config.method, found.methods) == ("none", [])
    found = distill_arguments.parse(["--config", str(tmp_path / "recipe.yaml"), "--general_points", "7"])
    assert (found.config.method, found.methods[0].general_points) == ("kd_detr", 7)


def test_an_option_that_several_methods_have_is_one_option_of_all() -> None:
    arguments = [
        "--config_name",
        "x",
        "--dataset_name",
        "shapes",
        "--output_dir",
        "o",
        "--method",
        "kd_detr,clockdistill",
        "--temperature",
        "3",
    ]
    points, targets = distill_arguments.parse(arguments).methods
    assert (type(points), type(targets)) == (KDDETRConfig, CLoCKDistillConfig)
    assert points.temperature == targets.temperature == 3


def test_options_of_one_name_have_one_meaning() -> None:
    """Of two methods: the same type and default. Of a method and the trainer or the script: none."""
    common = [
        distill_arguments.ScriptArguments,
        distill_arguments.AugmentationConfig,
        distill_arguments.DistillationConfig,
    ]
    taken = {field.name for kind in common for field in dataclasses.fields(kind)}
    seen: dict[str, tuple[object, object]] = {}
    for method in METHODS.values():
        types = typing.get_type_hints(method.config_class)
        for field in dataclasses.fields(method.config_class):
            assert field.name not in taken
            meaning = types[field.name], field.default
            assert seen.setdefault(field.name, meaning) == meaning, field.name
    assert "temperature" in seen


def test_arguments_that_nobody_knows_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("learning_rat: 0.1\n")
    with pytest.raises(ValueError, match="sets 'learning_rat': did you mean learning_rate"):
        distill_arguments.parse(["--config", str(tmp_path / "recipe.yaml")])
    with pytest.raises(ValueError, match=r"must be a YAML file or the name of a recipe, but .* does not exist"):
        distill_arguments.parse(["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(ValueError, match="Give the student as --model_name_or_path"):
        distill_arguments.parse(["--output_dir", str(tmp_path)])
    with pytest.raises(
        ValueError, match="--image_size must be a number or HEIGHTxWIDTH, up to 16384 pixels, got '12x'"
    ):
        distill_arguments.parse(
            ["--config_name", "x", "--dataset_name", "shapes", "--output_dir", str(tmp_path), "--image_size", "12x"]
        )


def test_image_sizes_are_height_by_width() -> None:
    sizes = {"128": (128, 128), "320x256": (320, 256), "320X256": (320, 256), None: None}
    assert {text: parse_image_size(text) for text in sizes} == sizes


@pytest.mark.parametrize("method", ["none", "kd_detr", "detrdistill"])
def test_help_names_every_argument_of_the_method(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        distill_arguments.parse(["--method", method, "--help"])
    text = capsys.readouterr().out
    assert ("--temperature" in text) == (method == "kd_detr")
    assert ("--variant" in text) == (method == "detrdistill")
    assert "--dataset_name" in text
    assert "--learning_rate" in text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_quickstart_is_understood(recipe: Path) -> None:
    arguments = distill_arguments.parse(["--config", str(recipe)])
    script, config = arguments.script, arguments.config
    assert Path(ROOT, script.config_name).is_file()
    assert config.teacher_model_name_or_path is None or Path(ROOT, config.teacher_model_name_or_path).is_dir()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_paper_s_preset_is_one_word_and_given_options_count(tmp_path: Path, method: str) -> None:
    words = ["--config_name", "x", "--output_dir", "o", "--method", method, "--use_cpu"]
    ours, paper = (distill_arguments.parse([*words, "--preset", name]) for name in ("ours", "paper"))
    published = METHODS[method].published
    found = {name: getattr(paper.methods[0], name) for name in published}
    assert found == published
    assert all(getattr(ours.methods[0], name) != value for name, value in published.items())
    assert {name: paper.recipe[name] for name in published} == published  # its recipe says them, too
    for name in published:
        given = str(getattr(ours.methods[0], name) or "bce").lower()
        again = distill_arguments.parse([*words, "--preset", "paper", f"--{name}", given])
        assert str(getattr(again.methods[0], name)).lower() == given
    with pytest.raises(ValueError, match="--preset must be ours or paper, got 'papers'"):
        distill_arguments.parse([*words, "--preset", "papers"])


def test_a_run_goes_on_without_an_image_that_vanished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "student.json").write_text(json.dumps(tiny.config("rt_detr").to_dict()))
    write_coco(Files(tmp_path / "files", {"train": 4, "val": 2}).splits(), tmp_path / "data")
    words = f"--config_name {tmp_path}/student.json --image_size 64 --dataset_name {tmp_path}/data --use_cpu"
    words += f" --output_dir {tmp_path}/out --max_steps 2 --save_steps 1 --per_device_train_batch_size 2"
    words += " --disable_tqdm true --measure_efficiency false --report_to none"
    distill.main(words.split())
    gone = next((tmp_path / "data" / "train").glob("*2.png"))
    gone.unlink()
    again = [*words.split(), "--resume_from_checkpoint", "true", "--max_steps", "4"]
    with pytest.raises(ValueError, match=f"1 problem .*{gone.name} does not exist"):
        distill.main(again)
    distill.main([*again, "--skip_unreadable_images"])
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 4
    assert f"1 images cannot be read and were dropped, among them {gone.parent}/{gone.name}" in caplog.text


def test_a_folder_knows_its_run(tmp_path: Path) -> None:
    (tmp_path / "student.json").write_text(json.dumps(tiny.config("rt_detr").to_dict()))
    words = f"--config_name {tmp_path}/student.json --image_size 64 --max_train_samples 4 --max_eval_samples 2"
    words += f" --output_dir {tmp_path}/out --max_steps 1 --use_cpu --disable_tqdm true --dataset_name shapes"
    words += " --measure_efficiency false --report_to none"
    distill.main(words.split())
    with pytest.raises(ValueError, match=r"holds a finished run: .* --overwrite_output_dir deletes it"):
        distill.main([*words.split(), "--learning_rate", "0.01"])  # the same run, once more
    distill.main([*words.split(), "--learning_rate", "0.01", "--overwrite_output_dir"])
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["learning_rate"] == 0.01 and "overwrite_output_dir" not in recipe
    for given, said in (
        (["--seed", "3"], "its seed is 42, and here 3"),
        (["--image_size", "96"], "its image_size is 64, and here 96"),
        (["--resume_from_checkpoint", "true", "--seed", "3"], "its seed is 42, and here 3"),
    ):
        with pytest.raises(ValueError, match=f"holds another run: {said}"):
            distill.main([*words.split(), *given])


def test_recipes_have_names(capsys: pytest.CaptureFixture[str]) -> None:
    recipes.main([])
    printed = capsys.readouterr().out
    assert re.search(r"^quickstart  +The quickstart: a 0.36 M student", printed, flags=re.MULTILINE)
    assert "papers/kd_detr_dab_r50_r18_coco" in printed and "ablation" not in printed
    assert distill_arguments.read_recipe("quickstart")["max_steps"] == 800
    with pytest.raises(ValueError, match="quickstar does not exist: did you mean quickstart"):
        distill_arguments.read_recipe("quickstar")
    with pytest.raises(ValueError, match=r"none\.yaml does not exist: `hf-detrkd recipes` lists"):
        distill_arguments.read_recipe("some/none.yaml")
