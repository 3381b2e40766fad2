"""Eight generated images, and a detector that learns them by heart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from hf_detrkd.adapters import DetectorAdapter
from hf_detrkd.data import AugmentationConfig, DetectionCollator, DetectionTransform, load_detection_splits
from hf_detrkd.losses.criterion import ModelCriterion
from hf_detrkd.structures.targets import Targets


STEPS = {"lw_detr": 800, "rf_detr": 1200, "dino_detr": 500}
"""The ViT of LW-DETR and RF-DETR starts from nothing, and DINO from the initial weights of its original code, which is
slower here; the others take 300."""


def images(size: int = 64) -> tuple[torch.Tensor, Targets, dict[int, str]]:
    """Pixels, ground truth, and the names of the classes."""
    splits = load_detection_splits("shapes", max_train_samples=8, max_eval_samples=1, shapes_size=(size, size))
    transform = DetectionTransform((size, size), augmentation=AugmentationConfig.none())
    dataset = splits.train.with_transform(transform)
    batch = DetectionCollator()([dataset[i] for i in range(8)])
    return batch["pixel_values"], Targets.from_labels(batch["labels"]), dict(enumerate(splits.train.classes))


def overfit(
    adapter: DetectorAdapter,
    pixels: torch.Tensor,
    targets: Targets,
    steps: int,
    learning_rate: float = 1e-3,
    theirs: bool = False,
    enough: float = 0.0,
) -> list[float]:
    """The loss of the last layer, every 10 steps; stops where it is `enough` of the first. `theirs` trains by the loss
    of transformers. The model ends in eval mode."""
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
    adapter.model.eval()
    return losses


def last_loss(adapter: DetectorAdapter, criterion: Callable, pixels: torch.Tensor, targets: Targets) -> float:
    adapter.model.eval()
    adapter.criterion = criterion
    with torch.no_grad():
        losses = adapter(pixels, targets=targets)[1]
    return sum(losses[name].item() for name in ("class", "box", "giou"))
