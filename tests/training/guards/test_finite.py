"""NaN and infinity: the run stops with term, layer and images, and keeps a sound checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_detrkd.structures.loss_key import LossKey
from hf_detrkd.training.finite_guard import FiniteGuard
from tests.runs import make_trainer, weights_of
from tests.training.guards.runs import broken


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
    with pytest.raises(FloatingPointError, match=rf"Step 2: non-finite losses: task_class, layer 0; .*ids {ids}"):
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
    with pytest.raises(FloatingPointError, match=f"The student's weights are not finite .*{name}"):
        trainer._save_checkpoint(trainer.model, trial=None)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({LossKey("task", "box"): torch.tensor([1.0, torch.inf])}, "task_box, layer 1"),
        ({LossKey("kd_detr", "class", "general", 2): torch.tensor(torch.nan)}, "kd_detr_class_general, layer 2"),
    ],
)
def test_messages_name_term_and_layer(terms: dict[str, Tensor], message: str):
    guard = FiniteGuard()
    guard.watch(7, {LossKey("task", "class"): torch.zeros(2)} | terms, [{"image_id": torch.tensor([3])}, {}])
    with pytest.raises(FloatingPointError, match=rf"Step 7: non-finite losses: {message}, on the images with ids 3"):
        guard.settle()
    guard.settle()
