"""Saved files: only the student as output, projections in checkpoints, the best checkpoint at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from hf_detrkd import DistillationTrainer
from tests.runs import assert_close, assert_trained, make_trainer


@pytest.fixture
def trained(tmp_path: Path) -> DistillationTrainer:
    arguments = {"widths": (32, 64), "method": "detrdistill", "method_config": {"assignment_weight": 0.0}}
    trainer = make_trainer(tmp_path / "out", save_strategy="steps", save_steps=2, **arguments)
    trainer.train()
    trainer.save_model()
    return trainer


def test_the_output_is_the_student_and_nothing_of_the_teacher(trained: DistillationTrainer) -> None:
    folder = Path(trained.args.output_dir)
    saved = load_file(folder / "model.safetensors")
    model, report = AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert type(model) is type(trained.student)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    own = {id(value): value.numel() for value in trained.student.state_dict(keep_vars=True).values()}
    assert sum(value.numel() for value in saved.values()) == sum(own.values())
    assert_close(dict(model.state_dict()), dict(trained.student.state_dict()), 0.0)
    assert list(model.config.id2label.values()) == ["disc", "box", "triangle", "cross", "ring", "diamond"]
    assert AutoImageProcessor.from_pretrained(folder).size == {"height": 64, "width": 64}
    assert not (folder / "distillation").exists()


def test_a_checkpoint_also_holds_the_projections(trained: DistillationTrainer) -> None:
    folder = Path(trained.args.output_dir, "checkpoint-2", "distillation")
    assert load_file(folder / "method.safetensors").keys() == trained.distiller.methods.state_dict().keys()
    assert json.loads((folder / "method.json").read_text())["methods"].keys() == {"detrdistill"}


def test_resuming_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    first = make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    first.train()
    second = make_trainer(tmp_path, method="kd_detr")
    with pytest.raises(ValueError, match="was not saved by a run with --method kd_detr"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_student_predicts_in_a_pipeline_where_this_package_is_unknown(
    trained: DistillationTrainer,
) -> None:
    folder = Path(trained.args.output_dir)
    trained.eval_dataset.records[0].load().save(folder / "image.png")
    code = f"""
import json, sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_detrkd":
            raise ImportError("hf_detrkd is not here")
sys.meta_path.insert(0, Wall())
from transformers import pipeline
found = pipeline("object-detection", model={str(folder)!r})({str(folder / "image.png")!r}, threshold=0.0)
assert "hf_detrkd" not in sys.modules
print(json.dumps(found))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    output = trained.predict(trained.eval_dataset.select([0]))
    ours = output.predictions
    assert found[0]["score"] == pytest.approx(float(ours["scores"][0, 0]), abs=1e-4)
    box = [found[0]["box"][key] for key in ("xmin", "ymin", "xmax", "ymax")]
    assert box == pytest.approx(ours["boxes"][0, 0].tolist(), abs=1.0)  # pipelines give whole pixels


def test_the_folder_of_a_model_given_as_an_object_is_not_overwritten(tmp_path: Path) -> None:
    first = make_trainer(tmp_path / "student")
    first.save_model()
    student = AutoModelForObjectDetection.from_pretrained(tmp_path / "student")
    arguments = {"train_dataset": first.train_dataset, "processing_class": first.processing_class}
    with pytest.raises(ValueError, match="output_dir must not be the folder of the student"):
        DistillationTrainer(student, first.args, **arguments)


def test_the_best_checkpoint_by_map_is_loaded_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(
        tmp_path,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=1e-2,
    )
    figures = iter([0.1, 0.3, 0.2, 0.2])

    def metrics(evaluation: object, compute_result: bool) -> dict[str, float]:
        return {"map": next(figures)} if compute_result else {}

    monkeypatch.setattr(trainer, "compute_metrics", metrics)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = AutoModelForObjectDetection.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    last = AutoModelForObjectDetection.from_pretrained(tmp_path / "checkpoint-3").state_dict()
    assert_close(dict(trainer.student.state_dict()), dict(best), 0.0)
    assert_trained(dict(best), dict(last))
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert (state["best_model_checkpoint"], state["best_global_step"]) == (None, 2)  # without the machine's path
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert_close(dict(trainer.student.state_dict()), dict(best), 0.0)
