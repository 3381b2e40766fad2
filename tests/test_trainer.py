"""The trainer: runs that must agree, what is saved, what is logged, what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForObjectDetection, EarlyStoppingCallback

from hf_detrkd import DistillationConfig, DistillationTrainer
from hf_detrkd.data import DetectionTransform
from tests import tiny
from tests.training import BATCH_NORM, make_trainer, weights_of


ROOT = Path(__file__).parent.parent
PLAIN = {"learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1, "lr_scheduler_type": "constant"}


def run(folder: Path, processes: int = 1, **arguments: object) -> dict[str, torch.Tensor]:
    """The weights after `tests.training` in processes of its own."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0", "--standalone"]
    command = [*launcher, "-m", "tests.training", str(folder), json.dumps(arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(folder / "weights.safetensors")


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=name)


def assert_same_update(
    before: dict[str, torch.Tensor],
    one: dict[str, torch.Tensor],
    other: dict[str, torch.Tensor],
    tolerance: float = 1e-5,
) -> None:
    """One plain gradient step each: the difference is at most so much of the step's length."""
    floats = [name for name, value in before.items() if value.is_floating_point()]
    step = torch.cat([(one[name] - before[name]).flatten() for name in floats])
    difference = torch.cat([(one[name] - other[name]).flatten() for name in floats])
    assert step.norm() > 0
    assert difference.norm() <= tolerance * step.norm(), (difference.norm(), step.norm())


def assert_trained(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


# --- runs that must agree --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["none", "kd_detr", "detrdistill"])
def test_two_micro_batches_of_two_train_as_one_batch_of_four(tmp_path: Path, method: str) -> None:
    common = PLAIN | {"family": "deformable_detr/two_stage", "method": method, "empty": (1, 2)}
    whole = make_trainer(tmp_path / "whole", per_device_train_batch_size=4, **common)
    before = weights_of(whole)
    whole.train()
    split = make_trainer(tmp_path / "split", per_device_train_batch_size=2, gradient_accumulation_steps=2, **common)
    split.train()
    assert_same_update(before, weights_of(whole), weights_of(split))
    assert whole.state.log_history[0]["task_loss"] == pytest.approx(split.state.log_history[0]["task_loss"], rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "method"),
    [("detr", "none"), ("deformable_detr/two_stage", "kd_detr,clockdistill"), ("rt_detr", "detrdistill")],
)
def test_two_processes_train_as_one_also_when_one_has_no_box(tmp_path: Path, family: str, method: str) -> None:
    student = {"num_denoising": 0} if family == "rt_detr" else {}  # denoising noise is drawn per process
    freeze = [BATCH_NORM] if family == "rt_detr" else None  # batch statistics are per process
    common = PLAIN | {"family": family, "method": method, "empty": [2, 3], "student": student, "freeze": freeze}
    before = weights_of(make_trainer(tmp_path, **common))
    one = run(tmp_path / "one", per_device_train_batch_size=4, **common)
    look = {"looks_first": method != "none"}
    two = run(tmp_path / "two", processes=2, per_device_train_batch_size=2, **common | look)
    assert_same_update(before, one, two)
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["log"][0]["loss"] == pytest.approx(reports[1]["log"][0]["loss"], rel=1e-5)
    figures = [{k: v for k, v in r["metrics"].items() if "map" in k or "mar" in k} for r in reports]
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_of_every_family_train_as_one_also_when_one_has_no_box(tmp_path: Path, family: str) -> None:
    student = {"num_denoising": 0} if family in tiny.DENOISING else {}
    names = [n for n, m in tiny.build(family).named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    freeze = [f"^{re.escape(name)}\\." for name in names] or None
    common = PLAIN | {"family": family, "empty": [2, 3], "student": student, "freeze": freeze}
    before = weights_of(make_trainer(tmp_path, **common))
    one = run(tmp_path / "one", per_device_train_batch_size=4, **common)
    two = run(tmp_path / "two", processes=2, per_device_train_batch_size=2, **common)
    # Rounding in a random box refinement: 3e-5 in float32; in float64 parts differ from the whole by 1e-8.
    assert_same_update(before, one, two, 1e-4 if family == "deformable_detr/refine" else 1e-5)


@pytest.mark.distributed
def test_two_processes_calibrate_one_set_of_weights(tmp_path: Path) -> None:
    run(tmp_path, processes=2, method="kd_detr,clockdistill", calibrate_weights=2, max_steps=1)
    weights = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["loss_weights"]
    entry = json.loads((tmp_path / "report.json").read_text())["log"][0]
    parts = {name: value for name, value in entry.items() if name.startswith(tuple(weights))}
    weighted = sum(weights[max((k for k in weights if n.startswith(k)), key=len)] * v for n, v in parts.items())
    assert entry["distillation_loss"] == pytest.approx(weighted, rel=1e-4)


@pytest.mark.distributed
def test_a_process_without_boxes_skips_denoising_and_waits_for_nobody(tmp_path: Path) -> None:
    run(tmp_path, processes=2, family="rt_detr", empty=[2, 3, 6, 7], max_steps=2)
    log = json.loads((tmp_path / "report.json").read_text())["log"]
    assert log[0]["task_loss"] == pytest.approx(log[0]["loss"], rel=1e-4)
    assert log[0]["task_class_denoising"] > 0


def test_a_run_killed_in_the_middle_and_resumed_ends_where_the_straight_run_ends(tmp_path: Path) -> None:
    arguments = {
        "method": "detrdistill",
        "method_config": {"assignment_weight": 0.0, "feature_weight": 1.0},
        "widths": [32, 64],
        "augment": True,
        "max_steps": 14,
        "save_strategy": "steps",
        "save_steps": 5,
        "learning_rate": 1e-3,
    }
    straight = run(tmp_path / "straight", **arguments)
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.training", str(folder), json.dumps(arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    state = folder / "checkpoint-5" / "trainer_state.json"
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    resumed = run(folder, **arguments, resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert any(name.startswith("methods.detrdistill.projections") for name in straight)
    assert_close(straight, resumed, 1e-6)
    file = "checkpoint-14/distillation/method.safetensors"
    projections = [load_file(tmp_path / name / file) for name in ("straight", "killed")]
    assert_close(*projections, 1e-6)


def test_the_projections_belong_to_the_seed_of_the_run(tmp_path: Path) -> None:
    arguments = {"widths": (32, 64), "method": "detrdistill", "method_config": {"assignment_weight": 0.0}}
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(weights))  # whatever the global generator holds
        weights.append(make_trainer(tmp_path, seed=seed, **arguments).distiller.methods.state_dict())
    assert_close(weights[0], weights[1], 0.0)
    assert_trained(weights[0], weights[2])


def test_general_points_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    runs = []
    for seed in (0, 0, 1):
        trainer = make_trainer(tmp_path, method="kd_detr", method_config={"specific_points": False}, seed=seed)
        torch.manual_seed(123 + len(runs))  # whatever the global generator holds
        trainer.distiller.student.config.num_denoising = 0
        trainer.train()
        runs.append([entry["kd_detr_box_general"] for entry in trainer.state.log_history if "loss" in entry])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0][0] != runs[0][1]


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kd_detr", "detrdistill"])
def test_bf16_trains_through_the_extra_decoder_passes(tmp_path: Path, askable: str, method: str) -> None:
    trainer = make_trainer(tmp_path, family=askable, method=method, bf16=True, teacher_dtype="bfloat16")
    before = weights_of(trainer)
    trainer.train()
    assert_trained(before, weights_of(trainer))
    assert all(torch.isfinite(value).all() for value in weights_of(trainer).values())
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "grad_norm" in entry)


# --- saving ----------------------------------------------------------------------------------------------------------


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
    figures = iter([0.1, 0.3, 0.2])

    def metrics(evaluation: object, compute_result: bool) -> dict[str, float]:
        return {"map": next(figures)} if compute_result else {}

    monkeypatch.setattr(trainer, "compute_metrics", metrics)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = AutoModelForObjectDetection.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    last = AutoModelForObjectDetection.from_pretrained(tmp_path / "checkpoint-3").state_dict()
    assert_close(dict(trainer.student.state_dict()), dict(best), 0.0)
    assert_trained(dict(best), dict(last))


# --- one run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kd_detr", "detrdistill", "clockdistill"])
def test_every_term_is_logged_by_name_and_the_loss_is_their_weighted_sum(tmp_path: Path, method: str) -> None:
    trainer = make_trainer(tmp_path, method=method, distillation_weight=0.5)
    trainer.train()
    entry = trainer.state.log_history[0]
    weights = trainer.distiller.loss_weights
    for part in weights:
        assert any(key.startswith(part) and value > 0 for key, value in entry.items()), part
    terms = sum(trainer.distiller.weight_of(key) * value for key, value in entry.items() if key.startswith(method))
    assert entry["distillation_loss"] == pytest.approx(terms, rel=1e-5)
    assert entry["loss"] == pytest.approx(entry["task_loss"] + 0.5 * terms, rel=1e-5)
    assert {
        "learning_rate",
        "images_per_second",
        "peak_memory_gb",
        "task_class",
        "task_box",
        "task_giou",
    } <= entry.keys()


def test_the_teacher_is_bit_identical_after_training_and_outside_everything(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, method="kd_detr")
    teacher = trainer.distiller.teacher.model
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = weights_of(trainer)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training
    own = {id(p) for p in teacher.parameters()}
    assert not own & {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert_trained(student, weights_of(trainer))


def test_the_backbone_has_its_own_learning_rate(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, learning_rate=1e-3, backbone_learning_rate=1e-5, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    backbone = {id(p) for name, p in trainer.student.named_parameters() if name.startswith("model.backbone.")}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[key] for key in backbone} == {1e-5}
    assert {rate for key, rate in rates.items() if key not in backbone} == {1e-3}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(trainer.student.parameters()))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


def test_freezing_is_what_the_patterns_say_whatever_transformers_froze(tmp_path: Path) -> None:
    assert not any(p.requires_grad for p in tiny.build("detr").model.backbone.parameters())
    trainer = make_trainer(tmp_path, family="detr", freeze=[r"backbone.*stages\.0", r"^class_labels"])
    names = [name for name, _ in trainer.student.named_parameters()]
    wanted = {n for n in names if ("backbone" in n and "stages.0" in n) or n.startswith("class_labels")}
    assert {name for name, p in trainer.student.named_parameters() if not p.requires_grad} == wanted
    with pytest.raises(ValueError, match=r"freeze pattern 'no such' matches no parameter"):
        make_trainer(tmp_path, freeze=["no such"])


def test_early_stopping_and_augmentation_by_epoch_work_as_in_trainer(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        images=4,
        augment=True,
        max_steps=-1,
        num_train_epochs=5,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        learning_rate=0.0,
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    seen = []
    original = DetectionTransform.__call__

    def spy(self: DetectionTransform, image: object, record: object, seed: int) -> object:
        if self.augmentation is not None:
            seen.append(seed)
        return original(self, image, record, seed)

    DetectionTransform.__call__ = spy
    try:
        trainer.train()
    finally:
        DetectionTransform.__call__ = original
    assert trainer.state.epoch == 2  # the learning rate is 0: the second epoch is no better than the first
    assert len(seen) == len(set(seen)) == 8  # every epoch shows every image in another way


def test_the_teacher_can_be_evaluated_before_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, method="kd_detr")
    own = make_trainer(tmp_path)
    own.student.load_state_dict(trainer.distiller.teacher.model.state_dict())
    wanted = {k.replace("eval_", "teacher_"): v for k, v in own.evaluate().items() if "map" in k}
    found = trainer.evaluate_teacher()
    assert {k: found[k] for k in wanted} == pytest.approx(wanted, abs=1e-6)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_arguments_that_cannot_work_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"method must be none, or some of clockdistill, detrdistill, .* got 'kd-detr'"
    ):
        DistillationConfig(str(tmp_path), method="kd-detr")
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
        DistillationConfig(str(tmp_path), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="remove_unused_columns must be false"):
        DistillationConfig(str(tmp_path), remove_unused_columns=True)
    with pytest.raises(ValueError, match="teacher_dtype must be float32, bfloat16 or float16"):
        DistillationConfig(str(tmp_path), teacher_dtype="int8")
    with pytest.raises(ValueError, match="--method kd_detr needs a teacher"):
        DistillationTrainer(tiny.build("detr"), DistillationConfig(str(tmp_path), method="kd_detr", use_cpu=True))
    with pytest.raises(ValueError, match="A teacher was given but no method"):
        DistillationTrainer(tiny.build("detr"), DistillationConfig(str(tmp_path), use_cpu=True), tiny.build("detr"))


@pytest.mark.parametrize("name", ["d_fine", "deimv2"])
def test_the_bins_of_d_fine_are_constants(tmp_path: Path, name: str) -> None:
    trainer = make_trainer(tmp_path, family=name)
    before = [parameter.clone() for n, parameter in bins_of(trainer)]
    trainer.train()
    assert len(before) == 2
    assert all(torch.equal(was, now) for was, (_, now) in zip(before, bins_of(trainer), strict=True))


def bins_of(trainer: DistillationTrainer) -> list[tuple[str, torch.Tensor]]:
    return [(n, p) for n, p in trainer.student.named_parameters() if n.endswith(("decoder.up", "decoder.reg_scale"))]


def test_distillation_follows_its_schedule_and_ends(tmp_path: Path) -> None:
    arguments = {"distillation_schedule": "linear", "distillation_stop": 0.5, "max_steps": 4, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, family="detr", method="kd_detr", **arguments)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    shares = [(entry["loss"] - entry["task_loss"]) / entry.get("distillation_loss", 1.0) for entry in log]
    assert shares == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-3)
    assert ["distillation_loss" in entry for entry in log] == [True, True, False, False]
