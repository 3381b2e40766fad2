"""Answers and objects by hand: what the tests of the gate share."""

from __future__ import annotations

from typing import Any

import torch

from hf_detrkd.structures.outputs import Predictions
from hf_detrkd.structures.targets import Targets


OBJECT = [0.5, 0.5, 0.5, 0.5]


def answers(boxes: Any, logits: Any, activation: str = "sigmoid") -> Predictions:
    boxes, logits = (torch.as_tensor(values, dtype=torch.float32)[None] for values in (boxes, logits))
    return Predictions(logits, boxes, torch.zeros(*boxes.shape[:2], 2), activation)


def objects(*boxes: list[float], labels: list[int]) -> Targets:
    return Targets.from_labels([{"class_labels": torch.tensor(labels), "boxes": torch.tensor(boxes).view(-1, 4)}])
