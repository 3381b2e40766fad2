"""The detection loss of a part of a batch's images: those whose labels are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_detrkd.adapters import adapter_for
from hf_detrkd.losses.criterion import ModelCriterion
from hf_detrkd.structures.targets import BatchTotals, Targets, known_labels, labeled_rows
from tests import tiny
from tests.losses.criterion import trainable


def answers_of(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)  # denoising draws random numbers
    adapter = adapter_for(model)
    truth = Targets.from_labels(known_labels(batch["labels"]))
    _, answers = adapter.encode(batch["pixel_values"], batch.get("pixel_mask"), truth)
    return answers, truth


def test_images_that_are_left_out_do_not_count(build: Any, family: str) -> None:
    model, batch = build(family), tiny.batch(96, boxes=(2, 4, 1))
    batch["labels"][1]["labeled"] = False
    answers, truth = answers_of(model, batch)
    rows, criterion = labeled_rows(batch["labels"]), adapter_for(model).criterion
    assert rows is not None and rows.tolist() == [0, 2] and truth.counts == (2, 0, 1)
    totals = BatchTotals.of((2, 1), tiny.NUM_QUERIES)
    found = criterion(answers.of_images(rows), truth.of_images(rows), totals)
    # The oracle: every image by itself.
    parts = [
        criterion(answers.of_images(torch.tensor([row])), truth.of_images(torch.tensor([row])), totals)
        for row in (0, 2)
    ]
    if not getattr(criterion, "dense_boxes", False):  # whose number of pairs is counted in each batch
        for name, value in found.items():
            torch.testing.assert_close(value, parts[0][name] + parts[1][name], rtol=1e-4, atol=1e-5, msg=name)
    everything = criterion(answers, truth, BatchTotals.of(truth.counts, tiny.NUM_QUERIES))
    assert abs(sum(everything.values()) - sum(found.values())) > 1e-3  # unknown is not the same as none


def test_without_a_known_image_the_loss_is_zero_and_reaches_what_it_always_reaches(build: Any, family: str) -> None:
    model, batch = build(family).requires_grad_(True), tiny.batch(96, boxes=(2, 1))
    for label in batch["labels"]:
        label["labeled"] = False
    answers, truth = answers_of(model, batch)
    rows, criterion = labeled_rows(batch["labels"]), adapter_for(model).criterion
    totals = BatchTotals(*torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0]))
    loss = sum(criterion(answers.of_images(rows), truth.of_images(rows), totals).values())
    alone = sum(criterion(answers.of_images(rows), truth.of_images(rows), BatchTotals.of((), 7)).values())
    assert float(loss.detach()) == float(alone.detach()) == 0
    usual = sum(criterion(answers, truth, BatchTotals.of(truth.counts, 7)).values())
    reached, wanted = (
        [g is not None for g in torch.autograd.grad(value, trainable(model), retain_graph=True, allow_unused=True)]
        for value in (loss, usual)
    )
    assert reached == wanted


def test_a_loss_that_the_model_computes_itself_cannot_leave_images_out(build: Any) -> None:
    adapter = adapter_for(build("detr"))
    adapter.criterion = ModelCriterion()
    batch = tiny.batch(64)
    _, answers = adapter.encode(batch["pixel_values"], None, Targets.from_labels(batch["labels"]))
    with pytest.raises(ValueError, match="cannot leave out images without labels"):
        answers.of_images(torch.tensor([0]))
