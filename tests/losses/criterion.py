"""The detection loss of any family and transformers' own: what the tests of the criterion share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
from transformers.loss.loss_lw_detr import LwDetrForObjectDetectionLoss
from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

from hf_detrkd.adapters import ADAPTERS, DetectorAdapter
from hf_detrkd.losses.criterion import DetectionCriterion
from hf_detrkd.structures.outputs import Predictions
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import tiny


LOSSES = {
    "detr": ForObjectDetectionLoss,
    "table-transformer": ForObjectDetectionLoss,
    "yolos": ForObjectDetectionLoss,
    "conditional_detr": DeformableDetrForObjectDetectionLoss,
    "dab-detr": DeformableDetrForObjectDetectionLoss,
    "deformable_detr": DeformableDetrForObjectDetectionLoss,
    "rt_detr": RTDetrForObjectDetectionLoss,
    "rt_detr_v2": RTDetrForObjectDetectionLoss,
    "lw_detr": LwDetrForObjectDetectionLoss,
    "rf_detr": LwDetrForObjectDetectionLoss,
}
CRITERIA = (
    "detr",
    "table-transformer",
    "conditional_detr",
    "dab-detr",
    "deformable_detr/two_stage",
    "rt_detr",
    "rt_detr_v2",
    "lw_detr",
    "rf_detr",
)
"""The forms of Deformable DETR share one; D-FINE and DEIMv2 are in `test_distributions.py`."""
DENOISING, GROUPED = tiny.DENOISING, tiny.GROUPED
COUNTS = [(2, 1), (3, 0), (0, 0), (9, 2), (1, 4, 12, 0)]
"""Boxes per image, of 7 queries: usual, an empty image, no box at all, more boxes than queries."""


def criterion_of(config: transformers.PreTrainedConfig) -> DetectionCriterion:
    return ADAPTERS[config.model_type].criterion_of(config)


def comparable(family: str, **overrides: Any) -> dict[str, Any]:
    """Config fields without which transformers' loss is another on purpose: see `test_criterion_faults.py`."""
    return overrides | ({"cls_loss_coefficient": 1} if family in ("conditional_detr", "dab-detr") else {})


def random_predictions(criterion: DetectionCriterion, batch: int, queries: int = tiny.NUM_QUERIES) -> Predictions:
    """Leaves of a graph."""
    softmax = criterion.classification == "cross_entropy"
    logits = (torch.randn(batch, queries, tiny.NUM_CLASSES + softmax) * 2).requires_grad_()
    boxes = tiny.random_boxes(batch, queries).requires_grad_()
    return Predictions(logits, boxes, None, "softmax" if softmax else "sigmoid")


def tensors_of(predictions: Sequence[Predictions]) -> list[Tensor]:
    return [tensor for one in predictions for tensor in (one.logits, one.boxes)]


def assert_same_loss(loss: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> None:
    """Equal values, and equal gradients with respect to `inputs`."""
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    pairs = (torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True) for value in (loss, expected))
    for found, wanted in zip(*pairs, strict=True):
        if found is None or wanted is None:
            assert all(gradient is None or not gradient.any() for gradient in (found, wanted))
        else:
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def reference(
    config: transformers.PreTrainedConfig,
    layers: Sequence[Predictions],
    labels: list[dict[str, Tensor]],
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """transformers' loss of these predictions."""
    dim = 1 if config.model_type in DENOISING else 0
    logits, boxes = (torch.stack(parts, dim) for parts in ([p.logits for p in layers], [p.boxes for p in layers]))
    last = layers[-1]
    loss, parts, _ = LOSSES[config.model_type](
        last.logits, labels, torch.device("cpu"), last.boxes, config, logits, boxes, **options
    )
    return loss, parts


def loss_of(adapter: DetectorAdapter, inputs: dict[str, Any], totals: BatchTotals | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)  # denoising draws random numbers
    targets = Targets.from_labels(inputs["labels"])
    return adapter(inputs["pixel_values"], inputs.get("pixel_mask"), targets, totals)[1]


def trainable(model: torch.nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def assert_same_parameter_gradients(
    model: torch.nn.Module, loss: Tensor, expected: Tensor, tolerance: float = 1e-5
) -> None:
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    first, second = (torch.autograd.grad(v, trainable(model), allow_unused=True) for v in (loss, expected))
    scale = max(gradient.abs().max() for gradient in second if gradient is not None)
    assert scale > 1e-3
    for name, found, wanted in zip(names, first, second, strict=True):
        found, wanted = (torch.zeros(()) if gradient is None else gradient for gradient in (found, wanted))
        assert (found - wanted).abs().max() < tolerance * max(scale, 1), name
