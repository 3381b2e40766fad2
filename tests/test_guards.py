"""What stops a run before it trains on nonsense: each guard is provoked once, and lets a sound run pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from hf_detrkd import DistillationConfig, DistillationTrainer
from hf_detrkd.data import DetectionTransform, load_detection_splits
from hf_detrkd.guards import FiniteGuard
from hf_detrkd.methods import CLoCKDistillConfig, KDDETRConfig
from hf_detrkd.outputs import Predictions
from hf_detrkd.preparation import batches_with_boxes, precision_of, prepare, set_weights
from hf_detrkd.probe import measure, untouched
from hf_detrkd.students import build_student
from tests.training import make_trainer, weights_of


QUICKSTART = Path(__file__).parent.parent / "scripts" / "recipes" / "quickstart"
CLASSES = ["disc", "box", "triangle", "cross", "ring", "diamond"]
PERMUTED = dict(zip(CLASSES, CLASSES[1:] + CLASSES[:1], strict=True))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., DistillationTrainer]:
    """A run with the quickstart's teacher, which can detect."""
    splits = load_detection_splits("shapes", max_train_samples=8, max_eval_samples=40)
    processor = AutoImageProcessor.from_pretrained(QUICKSTART / "teacher")
    transform = DetectionTransform.for_processor(processor)

    def make(method: str = "kd_detr", **arguments: Any) -> DistillationTrainer:
        torch.manual_seed(0)
        configs = {"kd_detr": KDDETRConfig(general_points=20), "clockdistill": CLoCKDistillConfig()}
        defaults = {"per_device_train_batch_size": 2, "max_steps": 2, "save_strategy": "no", "logging_steps": 1}
        return DistillationTrainer(
            model=build_student(str(QUICKSTART / "student_config.json"), splits.train.classes),
            teacher_model=AutoModelForObjectDetection.from_pretrained(QUICKSTART / "teacher"),
            args=DistillationConfig(
                str(tmp_path / "out"),
                method=method,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                **defaults | arguments,
            ),
            method_config=[config for name, config in configs.items() if name in method.split(",")],
            processing_class=processor,
            train_dataset=splits.train.with_transform(transform),
            eval_dataset=splits.eval.with_transform(transform),
        )

    return make


# --- the teacher -----------------------------------------------------------------------------------------------------


def test_a_teacher_that_can_detect_passes_and_its_figures_are_kept(make_run, tmp_path, capsys):
    trainer = make_run()
    trainer.train()
    kept = json.loads((tmp_path / "out" / "teacher_results.json").read_text())
    assert kept["teacher_map"] == trainer.teacher_metrics["teacher_map"] > 0.5
    printed = capsys.readouterr().out
    assert f"The teacher has a mAP of {kept['teacher_map']:.3f} on 40 evaluation images" in printed
    assert "diamond   diamond" in printed


def test_only_the_first_images_are_looked_at_where_that_is_asked(make_run, capsys):
    make_run(teacher_check_samples=3).train()
    assert "on 3 evaluation images" in capsys.readouterr().out


def test_a_permuted_class_map_stops_the_run_with_the_table(make_run, tmp_path):
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(PERMUTED))
    trainer = make_run(class_map=str(tmp_path / "map.yaml"))
    before = weights_of(trainer)
    message = r"a mAP of 0\.0\d\d on 40 evaluation images, and at least 0\.05 is asked(.|\n)*order of its classes"
    with pytest.raises(ValueError, match=message + r"(.|\n)*disc      box"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())


def in_another_frame(trainer: DistillationTrainer) -> None:
    """As a teacher answers whose boxes were relative to a canvas of twice the image's size."""
    teacher = trainer.distiller.teacher
    encode = teacher.adapter.encode

    def shifted(*args: Any) -> Any:
        output, answers = encode(*args)
        return replace(output, layers=tuple(replace(x, boxes=x.boxes / 2) for x in output.layers)), answers

    teacher.adapter.encode = shifted


def test_a_teacher_of_another_box_frame_stops_the_run(make_run):
    trainer = make_run()
    in_another_frame(trainer)
    with pytest.raises(ValueError, match=r"at least 0\.05 is asked(.|\n)*the frame of its boxes"):
        trainer.train()


def test_the_check_is_one_switch(make_run, tmp_path):
    trainer = make_run(min_teacher_map=0)
    in_another_frame(trainer)
    trainer.train()
    assert not (tmp_path / "out" / "teacher_results.json").exists()


def test_a_teacher_is_judged_by_the_classes_that_it_knows(make_run, tmp_path, capsys):
    """Of six classes it knows two: over all of them its mAP would be a third."""
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(dict.fromkeys(("triangle", "cross", "ring", "diamond"))))
    trainer = make_run(class_map=str(tmp_path / "map.yaml"), min_teacher_map=0.4, max_steps=1)
    trainer.train()
    assert trainer.teacher_metrics["teacher_map"] < 0.4
    assert "triangle  - (left out of class terms)" in capsys.readouterr().out


# --- the probe -------------------------------------------------------------------------------------------------------


def test_the_probe_prints_every_term_and_changes_nothing(make_run, capsys):
    plain, probed = make_run(probe=False), make_run("kd_detr")
    for trainer in (plain, probed):
        torch.manual_seed(1)
        trainer.train()
    printed = capsys.readouterr().out
    assert "kd_detr_giou_general" in printed
    assert "gradient" in printed
    for name, value in weights_of(plain).items():
        assert torch.equal(value, weights_of(probed)[name]), name
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, probed)]
    assert losses[0] == losses[1]


def broken(trainer: DistillationTrainer) -> None:
    with torch.no_grad():
        trainer.distiller.teacher.model.model.decoder.class_embed[-1].weight.fill_(torch.nan)


def test_a_nan_teacher_is_found_by_the_probe(make_run):
    trainer = make_run(min_teacher_map=0)
    broken(trainer)
    with pytest.raises(ValueError, match="kd_detr_class_specific is nan"):
        trainer.train()


def test_a_nan_teacher_fails_the_teacher_s_check(make_run):
    trainer = make_run()
    broken(trainer)
    with pytest.raises(ValueError, match=r"at least 0\.05 is asked"):
        trainer.train()


def test_weights_that_are_all_zero_stop_the_run_and_single_ones_do_not(make_run):
    make_run(loss_weights={"kd_detr_class": 0.0}).train()
    with pytest.raises(ValueError, match="every term is given the weight 0"):
        make_run(loss_weights={"kd_detr_": 0.0}).train()


def test_a_term_that_sends_no_gradient_to_the_student_stops_the_run(make_run):
    """Everything that the encoder's memory depends on is frozen: the memory can be compared, and not improved."""
    trainer = make_run("clockdistill")
    for name, parameter in trainer.student.named_parameters():
        parameter.requires_grad_("decoder." in name)
    with pytest.raises(ValueError, match="clockdistill_foreground is without gradient to the student"):
        trainer.train()


# --- calibration -----------------------------------------------------------------------------------------------------


def test_calibrated_terms_have_the_asked_share_of_the_gradient(make_run, tmp_path):
    trainer = make_run("kd_detr,clockdistill", calibrate_weights=1, calibration_fraction=0.2, learning_rate=1e-12)
    before = weights_of(trainer)
    set_weights(trainer)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())
    batch = next(batches_with_boxes(trainer, 1))
    with untouched(trainer.distiller), torch.random.fork_rng():
        found = measure(trainer.distiller, batch, precision_of(trainer), trainer.distiller.weight_key)
    shares = {term.name: term.gradient / found.task_gradient for term in found.terms}
    assert shares.keys() == trainer.distiller.loss_weights.keys()
    # The denoising queries of the task loss are drawn anew.
    assert all(0.1 < share < 0.4 for share in shares.values()), shares
    assert max(shares.values()) == pytest.approx(min(shares.values()), rel=1e-3)


def test_calibrated_weights_are_in_the_recipe_and_a_resumed_run_keeps_them(make_run, tmp_path):
    first = make_run(calibrate_weights=2, save_strategy="steps", save_steps=1)
    first.train()
    weights = first.distiller.loss_weights
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe == {"loss_weights": weights, "calibrate_weights": 0}
    assert weights != make_run().distiller.loss_weights
    resumed = make_run(calibrate_weights=2, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.distiller.loss_weights == weights


def test_a_weight_of_zero_stays_zero(make_run):
    trainer = make_run(calibrate_weights=1, loss_weights={"kd_detr_giou": 0.0})
    trainer.train()
    assert trainer.distiller.loss_weights["kd_detr_giou"] == 0.0
    assert trainer.distiller.loss_weights["kd_detr_box"] != 5.0


# --- NaN and infinity ------------------------------------------------------------------------------------------------


class Spoiled(torch.utils.data.Dataset):
    """A data set with one image of NaN."""

    def __init__(self, dataset: Any, place: int):
        self.dataset, self.place = dataset, place

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        if index == self.place:
            item["pixel_values"] = torch.full_like(item["pixel_values"], torch.nan)
        return item


def test_nan_stops_the_run_with_term_layer_and_images_and_the_checkpoint_is_sound(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=1)
    trainer.train_dataset = Spoiled(trainer.train_dataset, 5)  # images 4 and 5 are the third batch
    ids = ", ".join(str(int(trainer.train_dataset[i]["labels"]["image_id"])) for i in (4, 5))
    with pytest.raises(FloatingPointError, match=rf"Step 2: not finite are task_class, layer 0; .*ids {ids}"):
        trainer.train()
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-2"]
    resumed = make_trainer(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(value.isfinite().all() for value in weights_of(resumed).values() if value.is_floating_point())


def test_a_nan_teacher_is_named_by_term_and_layer_where_the_probe_is_off(make_run):
    trainer = make_run(min_teacher_map=0, probe=False)
    broken(trainer)
    with pytest.raises(FloatingPointError, match="kd_detr_class_specific, layer 0; kd_detr_"):
        trainer.train()


def test_infinite_weights_are_not_saved_although_every_loss_was_finite(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    name, parameter = next(iter(trainer.student.named_parameters()))
    with torch.no_grad():
        parameter.view(-1)[0] = torch.inf
    with pytest.raises(FloatingPointError, match=f"Weights of the student are not finite .*{name}"):
        trainer._save_checkpoint(trainer.model, trial=None)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"task_box": torch.tensor([1.0, torch.inf])}, "task_box, layer 1"),
        ({"kd_detr_class_general_2": torch.tensor(torch.nan)}, "kd_detr_class_general, layer 2"),
    ],
)
def test_messages_name_term_and_layer(terms: dict[str, Tensor], message: str):
    guard = FiniteGuard()
    guard.watch(7, {"task_class": torch.zeros(2)} | terms, [{"image_id": torch.tensor([3])}, {}])
    with pytest.raises(FloatingPointError, match=rf"Step 7: not finite are {message}, on the images with the ids 3"):
        guard.settle()
    guard.settle()


# --- what a run may be besides ---------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_calibrated_weights_unless_it_is_given_others(make_run, tmp_path):
    first = make_run(calibrate_weights=1, save_strategy="steps", save_steps=1)
    first.train()
    kept, given = make_run(max_steps=3), make_run(max_steps=3, loss_weights={"kd_detr_box": 7.0})
    for resumed in (kept, given):
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert kept.distiller.loss_weights == first.distiller.loss_weights
    assert given.distiller.loss_weights == {"kd_detr_class": 2.0, "kd_detr_box": 7.0, "kd_detr_giou": 2.0}


def test_several_evaluation_sets_are_checked_by_the_first(make_run, capsys):
    trainer = make_run()
    trainer.eval_dataset = {"first": trainer.eval_dataset, "second": trainer.train_dataset}
    trainer.train()
    assert "on 40 evaluation images" in capsys.readouterr().out


def test_a_training_set_without_a_length_is_neither_probed_nor_calibrated(make_run, capsys):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

    trainer = make_run(calibrate_weights=1)
    weights = dict(trainer.distiller.loss_weights)
    trainer.train_dataset = Stream()
    prepare(trainer, resumes=False)
    assert trainer.distiller.loss_weights == weights
    assert "gradient" not in capsys.readouterr().out


def test_without_an_evaluation_set_the_teacher_teaches_unseen(make_run):
    trainer = make_run()
    trainer.eval_dataset = None
    trainer.train()
    assert trainer.teacher_metrics is None


def test_a_gate_that_lets_nothing_through_is_no_fault(make_run, monkeypatch):
    """A student that does better on every object of the first images still has something to learn later."""

    def nothing(student: Predictions, teacher: Predictions, config: Any, one_to_one: bool) -> Tensor:
        return 0 * (student.logits.sum() + student.boxes[..., 0].expand(3, -1, -1))

    monkeypatch.setattr("hf_detrkd.methods.kd_detr.point_losses", nothing)
    trainer = make_run()
    with pytest.raises(ValueError, match="kd_detr_class_specific is zero; kd_detr_box_specific is zero"):
        prepare(trainer, resumes=False)  # of the same losses without a gate it is one
    object.__setattr__(trainer.distiller.methods["kd_detr"].config, "gate", "better")
    prepare(trainer, resumes=False)


def test_a_size_for_the_teacher_that_the_data_set_does_not_show_is_refused(make_run):
    with pytest.raises(ValueError, match="teacher_image_size is 96, but the data set shows the teacher nothing"):
        make_run(teacher_image_size="96").train()
    make_run(teacher_image_size="128").train()  # the student's own size


def test_activation_checkpointing_is_the_student_s(tmp_path):
    trainer = make_trainer(tmp_path, family="detr", method="kd_detr", gradient_checkpointing=True)
    trainer.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.student.modules())


@pytest.mark.parametrize("weights", ["{a: 1}", '["kd_detr_box"]', {"kd_detr_box": None}, {"kd_detr_box": "much"}])
def test_loss_weights_that_are_no_numbers_by_name_are_refused(tmp_path, weights):
    with pytest.raises(ValueError, match="loss_weights must be a JSON object of names and numbers, got"):
        DistillationConfig(str(tmp_path), loss_weights=weights)


def test_loss_weights_of_yaml_are_numbers(tmp_path):
    """YAML 1.1 reads 1e-3 as text."""
    weights = yaml.safe_load("{kd_detr_box: 1e-3}")
    assert DistillationConfig(str(tmp_path), loss_weights=weights).loss_weights == {"kd_detr_box": 0.001}
    assert DistillationConfig(str(tmp_path), method=["kd_detr", "clockdistill"]).methods == ["kd_detr", "clockdistill"]
