"""The moving average of the student: what it is, that it is what is evaluated and saved, and that it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_detrkd import DistillationTrainer
from hf_detrkd.training.ema import StudentAverage
from tests import tiny
from tests.runs import make_trainer, weights_of


def averaged(average: StudentAverage, value: torch.Tensor) -> torch.Tensor:
    """The average of a tensor of the student."""
    with average.in_place():
        return value.detach().clone()


def test_it_is_the_recursion_of_the_formula():
    student = nn.Linear(2, 1)
    average, expected = StudentAverage(student, 0.9), None
    for step in range(1, 101):
        with torch.no_grad():
            student.weight += torch.tensor([[1.0, -step]])
        average.update()
        decay = min(0.9, (1 + step) / (10 + step))
        own = student.weight.detach().clone()
        expected = own if expected is None else decay * expected + (1 - decay) * own
        torch.testing.assert_close(averaged(average, student.weight), expected)
    assert decay == 0.9


def test_buffers_are_the_student_s():
    student = nn.BatchNorm2d(2)
    average = StudentAverage(student, 0.9)
    for _ in range(3):
        student(torch.randn(4, 2, 3, 3) + 5)
        average.update()
    assert torch.equal(averaged(average, student.running_mean), student.running_mean)


def test_tied_heads_are_averaged_once_and_swapped_once():
    """One-stage Deformable DETR has one class head under several names."""
    student = tiny.build("deformable_detr/plain")
    average = StudentAverage(student, 0.9)
    before = student.class_embed[0].weight.detach().clone()
    average.update()
    for value in (1.0, 4.0):
        with torch.no_grad():
            student.class_embed[0].weight.fill_(value)
        average.update()
    found = averaged(average, student.class_embed[0].weight)
    # After the first step the decays are 3/12 and 4/13.
    expected = 4 / 13 * (3 / 12 * before + 9 / 12 * 1.0) + 9 / 13 * 4.0
    torch.testing.assert_close(found, expected)
    with average.in_place():
        torch.testing.assert_close(student.class_embed[-1].weight.detach(), expected)
    assert bool((student.class_embed[0].weight == 4.0).all())


def saved_in(trainer: DistillationTrainer, folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint under the model's own names."""
    return type(trainer.student).from_pretrained(folder).state_dict()


def test_the_average_is_evaluated_saved_and_left_behind(tmp_path: Path):
    trainer = make_trainer(tmp_path, max_steps=4, ema_decay=0.5, save_strategy="steps", save_steps=2)
    plain = make_trainer(tmp_path / "plain", max_steps=4, save_strategy="steps", save_steps=2)
    for one in (trainer, plain):
        torch.manual_seed(0)
        one.train()
    averaged = saved_in(trainer, tmp_path / "checkpoint-2")
    trained = saved_in(trainer, tmp_path / "plain" / "checkpoint-2")
    kept = load_file(tmp_path / "checkpoint-2" / "distillation" / "trained_student.safetensors")
    assert int(kept.pop("averaging.updates")) == 2
    assert all(torch.equal(kept[name], value) for name, value in trained.items())
    assert any(not torch.equal(averaged[name], value) for name, value in trained.items())
    found = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    loss = trainer.evaluate()["eval_loss"]
    assert all(torch.equal(value, found[name]) for name, value in trainer.student.state_dict().items())
    assert loss != plain.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "final"))
    assert all(torch.equal(value, found[name]) for name, value in saved_in(trainer, tmp_path / "final").items())


def test_evaluation_in_the_middle_sees_the_average_and_training_goes_on_with_the_student(tmp_path: Path):
    # Denoising queries would be drawn anew after an evaluation.
    options = {"max_steps": 3, "ema_decay": 0.5, "student": {"num_denoising": 0}}
    straight = make_trainer(tmp_path, **options)
    looked = make_trainer(tmp_path, eval_strategy="steps", eval_steps=1, **options)
    for one in (straight, looked):
        one.train()
    for name, value in weights_of(straight).items():
        assert torch.equal(value, weights_of(looked)[name]), name
    losses = [entry["eval_loss"] for entry in looked.state.log_history if "eval_loss" in entry]
    assert losses[-1] == pytest.approx(looked.evaluate()["eval_loss"], rel=1e-6)


def test_it_resumes_exactly(tmp_path: Path):
    options = {"max_steps": 4, "ema_decay": 0.7, "method": "kd_detr", "probe": False}
    straight = make_trainer(tmp_path / "straight", **options)
    straight.train()
    first = make_trainer(tmp_path / "broken", save_strategy="steps", save_steps=2, **options)
    first.train()
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    assert resumed._average.updates == straight._average.updates == 4
    for name, value in weights_of(straight).items():
        torch.testing.assert_close(weights_of(resumed)[name], value, rtol=0, atol=1e-7, msg=name)


def test_the_best_checkpoint_is_its_average(tmp_path: Path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, max_steps=3, ema_decay=0.5, load_best_model_at_end=True, **options)
    trainer.train()
    best = saved_in(trainer, Path(trainer.state.best_model_checkpoint))
    own = trainer.student.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in best.items())


def test_a_checkpoint_without_an_average_is_refused(tmp_path: Path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="checkpoint-1 was saved without --ema_decay: resume without it"):
        make_trainer(tmp_path, ema_decay=0.9).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_decays_that_are_none_are_refused(tmp_path: Path, decay: float):
    with pytest.raises(ValueError, match="ema_decay must be between 0 and 1"):
        make_trainer(tmp_path, ema_decay=decay)
