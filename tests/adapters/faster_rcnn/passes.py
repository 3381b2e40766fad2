"""Passes of a small Faster R-CNN over images of different sizes, and questions to it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_detrkd.adapters import DetectorAdapter
from hf_detrkd.structures.outputs import DetectorOutput, ObjectQueries, Predictions
from hf_detrkd.structures.targets import Targets
from tests import tiny
from tests.models.faster_rcnn import inputs_of, photographs


WHOLE_IMAGE = torch.tensor([0.5, 0.5, 1.0, 1.0])


def run(
    adapter: DetectorAdapter,
    inputs: dict[str, Tensor] | None = None,
    labels: list[dict[str, Tensor]] | None = None,
) -> tuple[DetectorOutput, dict[str, Tensor]]:
    """A pass over images of different sizes; sampling starts from the same seed."""
    inputs = inputs_of(photographs()) if inputs is None else inputs
    torch.manual_seed(0)
    return adapter(**inputs, targets=None if labels is None else Targets.from_labels(labels))


def foreign(count: int = 8, batch_size: int = 3, seed: int = 1) -> ObjectQueries:
    return ObjectQueries(boxes=tiny.random_boxes(batch_size, count, generator=torch.Generator().manual_seed(seed)))


def assert_same(answers: Predictions, others: Predictions) -> None:
    assert answers.class_boxes is not None and others.class_boxes is not None
    for name in ("logits", "hidden_states", "class_boxes", "boxes"):
        torch.testing.assert_close(getattr(answers, name), getattr(others, name), atol=1e-4, rtol=1e-4)


def differ(answers: Predictions, others: Predictions) -> bool:
    return bool((answers.logits - others.logits).abs().max() > 1e-2)


def some_loss(answers: Predictions) -> Tensor:
    """A loss that weighs every logit and coordinate differently, and all images alike."""
    generator = torch.Generator().manual_seed(2)
    values = torch.cat([answers.logits, answers.class_boxes.flatten(2)], -1)
    return (values * torch.randn(values.shape[1:], generator=generator)).sum()
