"""The detectors that transformers lacks, through trainer and scripts: what the DETR line is tested for elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, DetrImageProcessor

from hf_detrkd.cli import predict
from tests import tiny
from tests.runs import assert_close, assert_trained, make_trainer, run, weights_of


TASK_ADAPTIVE = {"family": "faster_rcnn", "method": "task_adaptive", "widths": [32, 64]}
FADING = TASK_ADAPTIVE | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def distilled_share(entry: dict[str, float]) -> float:
    """The factor that the distillation loss entered the loss with."""
    return (entry["loss"] - entry["task_loss"]) / entry["distillation_loss"]


def test_task_adaptive_regularization_fades_with_the_global_step_also_when_resumed(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", **FADING)
    folder = str(tmp_path / "straight" / "checkpoint-2")
    resumed = run(tmp_path / "resumed", **FADING, resume_from_checkpoint=folder)
    logs = [json.loads((tmp_path / name / "report.json").read_text())["log"] for name in ("straight", "resumed")]
    steps = [[entry for entry in log if "distillation_loss" in entry] for log in logs]
    for entries in steps:
        assert [distilled_share(entry) for entry in entries] == pytest.approx([1.0, 0.75, 0.5, 0.25], abs=1e-3)
    assert_close(straight, resumed, 1e-6)


def test_the_pass_rates_of_the_gates_are_logged_and_no_part_of_the_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **TASK_ADAPTIVE, max_steps=3)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "task_adaptive_box_pass" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert 0 <= entry["task_adaptive_class_pass"] <= 1 and 0 <= entry["task_adaptive_box_pass"] <= 1
        parts = [entry[f"task_adaptive_{part}"] for part in ("features", "class", "box")]
        assert entry["distillation_loss"] == pytest.approx(sum(parts), rel=1e-3)


@pytest.mark.distributed
@pytest.mark.parametrize("empty", [[], [2, 3, 6, 7]], ids=["boxes", "no boxes on one"])
def test_two_processes_train_a_faster_rcnn(tmp_path: Path, empty: list[int]) -> None:
    arguments = TASK_ADAPTIVE | {"empty": empty, "max_steps": 2}
    weights = run(tmp_path, processes=2, **arguments)
    assert all(value.isfinite().all() for value in weights.values())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["log"][0]["task_classifier"] > 0 and "eval_map" in report["metrics"]


@pytest.mark.parametrize("method", ["task_adaptive", "kd_detr", "clockdistill"])
def test_bf16_trains_a_faster_rcnn(tmp_path: Path, method: str) -> None:
    arguments = {"family": "faster_rcnn", "method": method, "bf16": True, "teacher_dtype": "bfloat16"}
    trainer = make_trainer(tmp_path, **arguments)
    before = weights_of(trainer)
    trainer.train()
    assert_trained(before, weights_of(trainer))
    assert all(torch.isfinite(value).all() for value in weights_of(trainer).values())


@pytest.mark.parametrize("family", ["faster_rcnn", "dino_detr"])
def test_an_evaluation_and_the_saved_student_say_the_same(tmp_path: Path, family: str) -> None:
    trainer = make_trainer(tmp_path / "out", family=family, method="kd_detr")
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    trainer.save_model()
    again = make_trainer(tmp_path / "again", family=family)
    again.student.load_state_dict(type(again.student).from_pretrained(tmp_path / "out").state_dict())
    figures = again.evaluate()
    assert figures["eval_map_50"] == pytest.approx(metrics["eval_map_50"], abs=1e-6)
    AutoImageProcessor.from_pretrained(tmp_path / "out")


def test_predict_reads_detections_after_nms(tmp_path: Path) -> None:
    tiny.build("faster_rcnn", options={"box_score_thresh": 0.0}).save_pretrained(tmp_path / "model")
    DetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "images" / "0.png")
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--input", str(tmp_path / "images")]
    predict.main([*arguments, "--output_dir", str(tmp_path / "out"), "--threshold", "0"])
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]
    assert 0 < len(found) <= 100 and all(entry["score"] > 0 for entry in found)
