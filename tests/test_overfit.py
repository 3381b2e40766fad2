"""Every family learns eight images by heart: the loss falls by 80 %. Minutes on one core: `make slow`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hf_detrkd.adapters import DetectorAdapter, adapter_for
from hf_detrkd.criterion import ModelCriterion
from hf_detrkd.data import AugmentationConfig, DetectionCollator, DetectionTransform, load_detection_splits
from hf_detrkd.outputs import Targets
from tests import tiny


STEPS = {"lw_detr": 800, "rf_detr": 1200}
"""Their ViT starts from nothing; the others take 300."""


def images() -> tuple[torch.Tensor, Targets, dict[int, str]]:
    splits = load_detection_splits("shapes", max_train_samples=8, max_eval_samples=1, shapes_size=(64, 64))
    transform = DetectionTransform((64, 64), augmentation=AugmentationConfig.none())
    dataset = splits.train.with_transform(transform)
    batch = DetectionCollator()([dataset[i] for i in range(8)])
    return batch["pixel_values"], Targets.from_labels(batch["labels"]), dict(enumerate(splits.train.classes))


def learn(
    family: str, steps: int, learning_rate: float = 1e-3, theirs: bool = False, enough: float = 0.0, seed: int = 0
) -> list[float]:
    """The loss of the last layer, every 10 steps; stops where it is `enough` of the first."""
    pixels, targets, classes = images()
    adapter = adapter_for(tiny.build(family, 64, seed=seed, id2label=classes).requires_grad_(True))
    ours = adapter.criterion
    optimizer = torch.optim.AdamW(adapter.model.parameters(), learning_rate, weight_decay=0)
    losses: list[float] = []
    for step in range(steps + 1):
        if step % 10 == 0:
            losses.append(last_loss(adapter, replace(ours, auxiliary=False), pixels, targets))
            if losses[-1] <= enough * losses[0]:
                break
        adapter.model.train()
        adapter.criterion = ModelCriterion() if theirs else ours
        optimizer.zero_grad()
        adapter(pixels, targets=targets)[0].loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.model.parameters(), 1.0)
        optimizer.step()
    return losses


def last_loss(adapter: DetectorAdapter, criterion: Callable, pixels: torch.Tensor, targets: Targets) -> float:
    adapter.model.eval()
    adapter.criterion = criterion
    with torch.no_grad():
        losses = adapter(pixels, targets=targets)[1]
    return sum(losses[name].item() for name in ("class", "box", "giou"))


@pytest.mark.slow
def test_the_loss_on_eight_images_falls_by_four_fifths(family: str) -> None:
    steps = STEPS.get(family, 300)
    losses = learn(family, steps, 2e-3 if steps > 300 else 1e-3, enough=0.2)
    assert losses[-1] <= 0.2 * losses[0], losses


@pytest.mark.slow
def test_two_stage_deformable_detr_learns_them_with_our_loss_and_not_with_that_of_transformers() -> None:
    ours, theirs = (learn("deformable_detr/two_stage", 200, theirs=flag, enough=0.2) for flag in (False, True))
    assert ours[-1] <= 0.2 * ours[0]
    assert theirs[-1] > 0.3 * theirs[0]
