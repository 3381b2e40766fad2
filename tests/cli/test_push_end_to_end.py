"""From `scripts/distill.py --push_to_hub` to `pipeline` in another process, over the Hub of the tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import pipeline

from hf_detrkd.data import load_detection_splits
from tests import ROOT, tiny
from tests.hub_server import HubServer


TOKEN = "hf_" + "q7Zk" * 8
DETECT = """
import json, sys
from transformers import pipeline

found = pipeline("object-detection", model=sys.argv[1])(sys.argv[2], threshold=0.0)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A run of two processes in a home folder of its own, pushed: the Hub, the run's folder and what it printed."""
    home = tmp_path_factory.mktemp("somebody")
    project = home / "project"
    project.mkdir()
    names = dict(enumerate(["disc", "box", "triangle", "cross", "ring", "diamond"]))
    make_teacher(home / "models" / "teacher", names)
    (project / "student.json").write_text(json.dumps(tiny.config("rt_detr").to_dict()))
    with HubServer(token=TOKEN) as hub:
        environment = hub.environment(home / "cache") | {
            "HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        two = ROOT / "scripts" / "accelerate_configs" / "cpu.yaml"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(two)]
        command += ["--main_process_port", "0", str(ROOT / "scripts" / "distill.py")]
        arguments = ["--use_cpu"]
        arguments += [
            "--config_name",
            "student.json",
            "--teacher_model_name_or_path",
            str(home / "models" / "teacher"),
        ]
        arguments += [
            "--method",
            "kd_detr",
            "--run_control",
            "true",
            "--dataset_name",
            "shapes",
            "--image_size",
            "64",
            "--max_train_samples",
            "8",
        ]
        arguments += ["--max_eval_samples", "4", "--max_steps", "2", "--per_device_train_batch_size", "1"]
        arguments += [
            "--min_teacher_map",
            "0",
            "--report_to",
            "tensorboard",
            "--logging_steps",
            "1",
            "--save_steps",
            "1",
        ]
        arguments += ["--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end", "true"]
        arguments += [
            "--output_dir",
            str(project / "outputs" / "student"),
            "--push_to_hub",
            "--hub_model_id",
            "user/student",
        ]
        arguments += ["--hub-token", TOKEN, "--hub_strategy", "all_checkpoints", "--hub_license", "apache-2.0"]
        ran = subprocess.run(
            [*command, *arguments], cwd=project, env=environment, capture_output=True, text=True, timeout=280
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        folder = project / "outputs" / "student"
        yield {"hub": hub, "folder": folder, "home": home, "said": ran.stdout + ran.stderr}


def make_teacher(folder: Path, names: dict[int, str]) -> None:
    from hf_detrkd.distillation.student import load_image_processor

    model = tiny.build("rt_detr", 64, id2label=names, label2id={name: number for number, name in names.items()})
    model.save_pretrained(folder)
    load_image_processor(model, image_size=(64, 64)).save_pretrained(folder)


def detect(model: str, image: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    ran = subprocess.run(
        [sys.executable, "-c", DETECT, model, str(image)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.strip().splitlines()[-1])


def test_a_pipeline_elsewhere_finds_what_the_student_found_here(pushed: dict[str, Any], tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    load_detection_splits("shapes", max_eval_samples=1, shapes_size=(64, 64)).eval.records[0].load().save(image)
    elsewhere = pushed["hub"].environment(tmp_path / "empty") | {"OMP_NUM_THREADS": "1"}
    before = pipeline("object-detection", model=str(pushed["folder"]))(str(image), threshold=0.0)
    assert len(before) > 0
    assert detect("user/student", image, elsewhere) == before


def test_the_hub_gets_student_card_recipe_results_and_pictures_alone(pushed: dict[str, Any]) -> None:
    files = set(pushed["hub"].repos["user/student"].files()) - {".gitattributes"}
    pictures = {"curves.png", "per_class.png", "pr_curves.png", "predictions.png"}
    results = {"all_results.json", "precision.json", "recipe.yaml", "report.html", "run.json", "summary.json"}
    student = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    checkpoints = {name for name in files if name.startswith("checkpoint-")}
    assert files - checkpoints == student | results | pictures
    assert {"checkpoint-1/optimizer.pt", "checkpoint-2/model.safetensors"} <= checkpoints
    messages = [commit.message for commit in pushed["hub"].repos["user/student"].commits]
    assert json.loads((pushed["folder"] / "run.json").read_text())["processes"] == 2
    assert messages[-1] == "End of training" and "Model save" not in messages  # the card comes with what it tells


def test_no_token_and_no_home_path_is_in_any_file_log_or_commit(pushed: dict[str, Any]) -> None:
    secrets = {"the token": TOKEN.encode(), "a home path": str(pushed["home"]).encode()}
    places = {str(f): f.read_bytes() for f in pushed["folder"].rglob("*") if f.is_file()}
    places |= {"the log": pushed["said"].encode(), "what the Hub received": pushed["hub"].received}
    for commit in pushed["hub"].repos["user/student"].commits:
        places |= {f"{path} of {commit.message}": content for path, content in commit.files.items()}
    found = [(name, place) for place, content in places.items() for name, value in secrets.items() if value in content]
    assert not found
    assert len(places) > 25


def test_the_recipe_here_still_repeats_the_run(pushed: dict[str, Any]) -> None:
    recipe = yaml.safe_load((pushed["folder"] / "recipe.yaml").read_text())
    assert recipe["teacher_model_name_or_path"] == "~/models/teacher"
    assert recipe["hub_model_id"] == "user/student" and "hub_token" not in recipe


def test_the_cards_metadata_pass_the_hubs_own_check_and_equal_the_results(pushed: dict[str, Any]) -> None:
    card = ModelCard(pushed["hub"].repos["user/student"].files()["README.md"].decode())
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    data, results = card.data, json.loads((pushed["folder"] / "all_results.json").read_text())
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "object-detection", "apache-2.0")
    assert data.tags == ["hf-detrkd", "object-detection", "knowledge-distillation", "kd_detr"]
    assert data.to_dict()["teacher"] == "teacher" and "teacher_revision" not in data.to_dict()  # a folder
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {
        "mAP": results["eval_map"],
        "mAP50": results["eval_map_50"],
        "mAP75": results["eval_map_75"],
    }
    assert {(result.dataset_name, result.dataset_split) for result in data.eval_results} == {("shapes", "validation")}
    summary = json.loads((pushed["folder"] / "summary.json").read_text())
    assert list(summary) == ["teacher", "control", "distilled"]
    assert summary["distilled"]["map"] == results["eval_map"]
    for row in summary.values():
        assert f"{row['parameters']:,}" in card.text and f"{row['gflops']:.2f}" in card.text


def test_the_cards_snippet_runs_as_it_stands(pushed: dict[str, Any], tmp_path: Path) -> None:
    text = pushed["hub"].repos["user/student"].files()["README.md"].decode()
    snippet = text.split("```python\n")[1].split("```")[0]
    load_detection_splits("shapes", max_eval_samples=1, shapes_size=(64, 64)).eval.records[0].load().save(
        tmp_path / "image.jpg"
    )
    environment = pushed["hub"].environment(tmp_path / "empty") | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", snippet.replace("threshold=0.5", "threshold=0.0")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "xmin" in ran.stdout
