"""A drop-in for `Trainer`: students, data sets and options that people hand over."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import TrainerCallback, TrainingArguments

from hf_detrkd import DistillationConfig, DistillationTrainer
from hf_detrkd.data import AugmentationConfig, DetectionTransform
from hf_detrkd.training.callbacks import set_epoch
from tests import tiny
from tests.runs import SequentialTrainer, make_trainer


class Own(Dataset):
    """A data set of one's own, made from ours by a change of its labels or items."""

    def __init__(self, base: Any, change: Any):
        self.base, self.change = base, change

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Any:
        item = dict(self.base[index])
        item["labels"] = dict(item["labels"])
        return self.change(item) or item


def with_data(base: DistillationTrainer, change: Any, evaluates: bool = False) -> DistillationTrainer:
    train, evaluation = base.train_dataset, base.eval_dataset
    return DistillationTrainer(
        model=base.student,
        args=base.args,
        train_dataset=train if evaluates else Own(train, change),
        eval_dataset=Own(evaluation, change) if evaluates else evaluation,
        processing_class=base.processing_class,
    )


def labels(**changes: Any) -> Any:
    def change(item: dict[str, Any]) -> None:
        for name, make in changes.items():
            item["labels"][name] = make(item["labels"][name])

    return change


FAULTS = {
    "pixels as boxes": (labels(boxes=lambda b: b * 64), r"has boxes up to .* divide pixels by the image's width"),
    "corners": (
        labels(boxes=lambda b: torch.full_like(b, 0.9)),
        r"boxes that leave their image: they must be \(center_x, center_y, width, height\), not corners",
    ),
    "classes from 1": (labels(class_labels=lambda c: c * 0 + 6), "has class_labels from 6 to 6, but .* are 0 to 5"),
    "negative classes": (labels(class_labels=lambda c: c * 0 - 1), "has class_labels from -1"),
    "float classes": (labels(class_labels=lambda c: c.float()), "must have class_labels of whole numbers"),
    "lists": (labels(class_labels=lambda c: c.tolist()), "must have class_labels of whole numbers .*, got a list"),
    "other shape": (labels(boxes=lambda b: b[:, :3]), r"must have boxes of floats \(\d+, 4\)"),
    "not finite": (labels(boxes=lambda b: b * float("nan")), "has boxes that are not finite"),
    "bytes": (
        lambda item: item | {"pixel_values": (item["pixel_values"] * 255).byte()},
        r"must have normalised pixel_values, floats of shape \(3, height, width\), got \(3, 64, 64\) of uint8",
    ),
    "no labels": (
        lambda item: {"pixel_values": item["pixel_values"]},
        r"dict with pixel_values and labels, got \['pix",
    ),
    "no boxes": (
        lambda item: item | {"labels": {"class_labels": 0}},
        r"labels with class_labels and boxes, got \['cl",
    ),
    "a tuple": (lambda item: (item["pixel_values"], item["labels"]), "must be a dict .*, got tuple"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_items_of_one_s_own_data_set_are_checked_by_name(tmp_path: Path, fault: str) -> None:
    change, words = FAULTS[fault]
    with pytest.raises(ValueError, match=f"Item 0 of train_dataset {words}|Item 0 of train_dataset .*{words}"):
        with_data(make_trainer(tmp_path), change).train()


def test_a_part_of_a_data_set_of_bytes_trains_as_one_of_floats(tmp_path: Path) -> None:
    losses = []
    for normalize in (True, False):
        base = make_trainer(tmp_path / str(normalize), max_steps=1)
        shown = DetectionTransform((64, 64), augmentation=AugmentationConfig.none(), normalize=normalize)
        part = Subset(base.train_dataset.with_transform(shown), range(4))
        base.train_dataset = part
        base.train()
        losses.append(base.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_teacher_and_its_answers_are_one_too_many(tmp_path: Path) -> None:
    base = make_trainer(tmp_path, method="kd_detr")
    base.args.teacher_answers = str(tmp_path / "answers")
    with pytest.raises(ValueError, match="Set teacher_model or teacher_answers, not both"):
        DistillationTrainer(base.student, base.args, teacher_model=base.distiller.teacher.model)


def test_the_metric_says_what_it_needs(tmp_path: Path) -> None:
    base = make_trainer(tmp_path)
    bare = with_data(base, lambda item: item["labels"].pop("orig_size").numel() * 0 or None, evaluates=True)
    with pytest.raises(ValueError, match="Item 0 of eval_dataset has no orig_size in its labels"):
        bare.evaluate()
    bare.args.prediction_loss_only = True
    assert bare.evaluate().keys() >= {"eval_loss"}


def test_metrics_of_one_s_own_need_no_map(tmp_path: Path) -> None:
    base = make_trainer(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
    base.args.batch_eval_metrics = False
    base.compute_metrics = lambda _: {"mine": 1.0}
    base.train()
    assert base.state.log_history[-2]["eval_mine"] == 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"metric_for_best_model": "mAP"},
            "is 'mAP', but the evaluation has loss, map, .*map_disc.*: set one",
        ),
        (
            {"prediction_loss_only": True, "load_best_model_at_end": True, "save_strategy": "epoch"},
            "is 'map', but the evaluation has loss, because of prediction_loss_only",
        ),
    ],
)
def test_the_metric_of_the_best_checkpoint_is_checked_before_the_run(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    trainer = make_trainer(tmp_path, eval_strategy="epoch", **options)
    with pytest.raises(ValueError, match=words):
        trainer.train()
    assert not trainer.state.log_history


def test_a_loss_selects_the_checkpoint_with_the_lowest(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        max_steps=3,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="eval_loss",
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.state.best_metric == min(losses) < max(losses)


def test_images_without_boxes_may_have_an_empty_tensor_of_any_shape(tmp_path: Path) -> None:
    none = {"boxes": torch.tensor([]), "class_labels": torch.tensor([], dtype=torch.int64)}
    none |= {"area": torch.tensor([]), "iscrowd": torch.tensor([], dtype=torch.int64)}
    base = make_trainer(tmp_path, max_steps=1)
    for evaluates in (False, True):
        one = with_data(base, lambda item: item["labels"].update(none), evaluates)
        one.evaluate() if evaluates else one.train()


def student_of(base: DistillationTrainer, dtype: torch.dtype = torch.float32) -> Any:
    config = base.student.config
    return tiny.build("detr", 32, id2label=config.id2label, label2id=config.label2id).to(dtype)


def test_what_the_owner_of_a_student_froze_stays_frozen(tmp_path: Path) -> None:
    base = make_trainer(tmp_path, "detr")
    student = student_of(base).requires_grad_(False)
    student.class_labels_classifier.requires_grad_(True)
    before = [name for name, p in student.named_parameters() if p.requires_grad]
    made = DistillationTrainer(model=student, args=base.args, train_dataset=base.train_dataset)
    assert [name for name, p in made.student.named_parameters() if p.requires_grad] == before
    args = copy.deepcopy(base.args)
    args.freeze = ["class_labels_classifier"]
    made = DistillationTrainer(model=student, args=args, train_dataset=base.train_dataset)
    assert all(p.requires_grad for name, p in made.student.named_parameters() if "backbone" in name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_student_in_16_bits_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_trainer(tmp_path, "detr")
    with pytest.raises(
        ValueError, match=r"weights are b?float16, in which small steps are lost: .* dtype=torch.float32"
    ):
        DistillationTrainer(model=student_of(base, dtype), args=base.args, train_dataset=base.train_dataset)


def test_students_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    base = make_trainer(tmp_path, "detr", "kd_detr")
    student = student_of(base)
    with pytest.raises(ValueError, match=r"are the same object, .* copy\.deepcopy\(model\)"):
        DistillationTrainer(model=student, teacher_model=student, args=base.args)
    with pytest.raises(ValueError, match="must be a detector of transformers, or its name, got a Linear"):
        DistillationTrainer(model=torch.nn.Linear(1, 1), args=base.args)
    with pytest.raises(ValueError, match="takes its arguments as a DistillationConfig, got TrainingArguments"):
        DistillationTrainer(model=student, args=TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="Give either model or model_init, not both"):
        DistillationTrainer(model=student, model_init=lambda: student, args=base.args)


@pytest.mark.parametrize("flag", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluations_in_16_bit_weights_are_refused(tmp_path: Path, flag: str) -> None:
    with pytest.raises(ValueError, match="set bf16 or fp16, which evaluate in mixed precision"):
        DistillationConfig(str(tmp_path), use_cpu=True, **{flag: True})


@pytest.mark.parametrize("takes", [True, False])
def test_model_init_gives_every_trial_a_student_of_its_own(tmp_path: Path, takes: bool) -> None:
    base = make_trainer(tmp_path, "detr", "kd_detr", max_steps=1)
    made = []

    def build(*trial: Any) -> Any:
        made.append(student_of(base))
        return made[-1]

    init = (lambda trial: build(trial)) if takes else (lambda: build())
    trainer = DistillationTrainer(
        model_init=init, teacher_model=base.distiller.teacher.model, args=base.args, train_dataset=base.train_dataset
    )
    assert trainer.student is made[0]
    first = [p.detach().clone() for p in made[0].parameters()]
    trainer.train()  # as a trial does
    assert trainer.student is made[1] is not made[0]
    assert all(torch.equal(a, b) for a, b in zip(first, made[0].parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, made[1].parameters(), strict=True))


def test_every_trial_begins_with_new_projections_and_its_own_average(tmp_path: Path) -> None:
    options = {"widths": (32, 64), "max_steps": 1, "ema_decay": 0.5, "learning_rate": 0.1}
    base = make_trainer(tmp_path, "rt_detr", "clockdistill", **options)
    names = {"id2label": base.student.config.id2label, "label2id": base.student.config.label2id}
    trainer = DistillationTrainer(
        model_init=lambda: tiny.build("rt_detr", 32, **names),
        teacher_model=base.distiller.teacher.model,
        args=base.args,
        train_dataset=base.train_dataset,
    )
    first = {name: value.clone() for name, value in trainer.distiller.methods.state_dict().items()}
    trainer.train()
    trained = trainer.distiller.methods.state_dict()
    assert first and any(not torch.equal(value, trained[name]) for name, value in first.items())
    again = trainer.call_model_init()
    assert all(torch.equal(value, first[name]) for name, value in again.methods.state_dict().items())
    followed = [callback.average for callback in trainer.callback_handler.callbacks if hasattr(callback, "average")]
    assert followed == [trainer._average] and trainer._average.student is again.student


class Small(SequentialTrainer):
    """Memory for two images."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if len(inputs["pixel_values"]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return loss


def test_failed_attempts_at_a_batch_size_leave_no_trace_in_the_log(tmp_path: Path) -> None:
    options = {"max_steps": 2, "trainer_class": Small}
    found = make_trainer(tmp_path / "a", per_device_train_batch_size=8, auto_find_batch_size=True, **options)
    found.train()
    wanted = make_trainer(tmp_path / "b", per_device_train_batch_size=2, **options)
    wanted.train()
    for one, other in zip(found.state.log_history[:2], wanted.state.log_history[:2], strict=True):
        assert one["task_loss"] == pytest.approx(other["task_loss"], rel=0.01)  # BatchNorm saw the failed batches
        assert one["loss"] == pytest.approx(one["task_loss"], rel=1e-5)


def test_a_missing_optimizer_is_said_before_anything_runs(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, method="kd_detr", optim="adamw_bnb_8bit")
    with pytest.raises(ImportError, match="bitsandbytes"):
        trainer.train()
    assert trainer.teacher_metrics is None and not (tmp_path / "teacher_results.json").exists()


def test_epochs_reach_data_sets_inside_others(tmp_path: Path) -> None:
    data = make_trainer(tmp_path, augment=True).train_dataset
    first, second = data.select([0, 1]), data.select([2, 3])
    set_epoch(ConcatDataset([Subset(first, [1]), second]), 5)
    assert (first.epoch, second.epoch, data.epoch) == (5, 5, 0)
    set_epoch([1, 2], 3)  # what has no epoch is left alone


def test_callbacks_find_in_the_model_what_they_find_in_trainer_s(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Usual(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen["parameters"] = model.num_parameters()
            seen["device"] = model.device
            seen["logits"] = model.eval()(pixel_values=torch.zeros(1, 3, 64, 64)).logits
            model.save_pretrained(tmp_path / "saved")
            with pytest.raises(AttributeError, match="nothing"):
                _ = model(pixel_values=torch.zeros(1, 3, 64, 64)).nothing

    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[Usual()])
    trainer.train()
    assert seen["parameters"] == trainer.student.num_parameters() and seen["device"].type == "cpu"
    assert seen["logits"].shape[0] == 1 and (tmp_path / "saved" / "model.safetensors").is_file()


@contextmanager
def warnings_that_caplog_sees() -> Iterator[None]:
    """Those of transformers and of this package, which follow its settings."""
    transformers.logging.enable_propagation()
    transformers.logging.set_verbosity_warning()
    try:
        yield
    finally:
        transformers.logging.disable_propagation()
        transformers.logging.set_verbosity_error()


def test_a_checkpoint_without_the_optimizer_says_what_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    make_trainer(tmp_path, max_steps=1, **options).train()
    with warnings_that_caplog_sees():
        make_trainer(tmp_path, max_steps=2, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "checkpoint-1 holds no state of the optimizer (save_only_model)" in caplog.text


def test_a_best_student_without_an_optimizer_is_no_resumed_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True, "load_best_model_at_end": True}
    trainer = make_trainer(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, **options)
    with warnings_that_caplog_sees():
        trainer.train()
    assert "start anew" not in caplog.text


def with_sets(
    base: DistillationTrainer, names: tuple[str, str] = ("near", "far"), **given: Any
) -> DistillationTrainer:
    """The run with its evaluation set, and two images of it, under names."""
    return DistillationTrainer(
        model=base.student,
        args=base.args,
        train_dataset=base.train_dataset,
        eval_dataset=dict(zip(names, (base.eval_dataset, base.eval_dataset.select([0, 1])), strict=True)),
        processing_class=base.processing_class,
        **given,
    )


EVALUATED = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}


def test_a_default_metric_is_no_wish_with_several_evaluation_sets_either(tmp_path: Path) -> None:
    trainer = with_sets(make_trainer(tmp_path / "loss", prediction_loss_only=True, **EVALUATED))
    trainer.train()
    assert {"eval_near_loss", "eval_far_loss"} <= {name for row in trainer.state.log_history for name in row}
    base = make_trainer(tmp_path / "mine", **EVALUATED)
    base.args.batch_eval_metrics = False
    with_sets(base, compute_metrics=lambda _: {"mine": 1.0}).train()


def test_an_evaluation_set_may_be_called_eval(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    trainer = with_sets(make_trainer(tmp_path, **EVALUATED, **best), ("eval", "test"))
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert trainer._curves and trainer._curves is not trainer.compute_metrics.precision  # those of the first set


def test_several_evaluation_sets_have_names(tmp_path: Path) -> None:
    trainer = with_sets(make_trainer(tmp_path, **EVALUATED))
    left_out: list[float] = []
    trainer._leave_out = left_out.append
    trainer.train()
    assert len(left_out) == 2  # once for each set
    logged = {name for row in trainer.state.log_history for name in row}
    assert {"eval_near_map", "eval_far_map"} <= logged
