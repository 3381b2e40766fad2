"""DINO's loss: that of the paper's formulas, and that of the criterion of distillation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_detrkd.adapters import adapter_for
from hf_detrkd.models import DinoDetrConfig
from hf_detrkd.structures.targets import Targets
from tests import tiny
from tests.models.dino_detr import DECODED, Build, assert_same_gradients, gradients, run


def naive_loss(output: Any, labels: list[dict[str, Tensor]], config: DinoDetrConfig) -> Tensor:
    """The paper's loss, one image and box at a time, in double precision."""
    count, most = max(sum(len(label["boxes"]) for label in labels), 1), max(len(label["boxes"]) for label in labels)
    start = output.intermediate_logits.shape[2] - config.num_queries
    groups = start // (2 * most) if start else 0
    total = torch.zeros((), dtype=torch.double)
    for image, label in enumerate(labels):
        classes, wanted = label["class_labels"].tolist(), label["boxes"].double()
        total += (
            set_loss(output.enc_topk_logits[image], output.enc_topk_bboxes[image], classes, wanted, config) / count
        )
        copies = [(2 * most * group + i, i) for group in range(groups) for i in range(len(classes))]
        for logits, boxes in zip(
            output.intermediate_logits[image], output.intermediate_reference_points[image], strict=True
        ):
            total += set_loss(logits[start:], boxes[start:], classes, wanted, config) / count
            if groups:
                noised = set_loss(logits[:start], boxes[:start], classes, wanted, config, copies)
                total += noised / (count * groups)
    return total


def set_loss(
    logits: Tensor,
    boxes: Tensor,
    classes: list[int],
    wanted: Tensor,
    config: DinoDetrConfig,
    pairs: list[tuple[int, int]] | None = None,
) -> Tensor:
    """Weighted focal loss of all rows, L1 and GIoU of the (row, box) pairs; by default those of least cost."""
    chances, boxes = logits.double().sigmoid(), boxes.double()
    corners, goals = (torchvision.ops.box_convert(values, "cxcywh", "xyxy") for values in (boxes, wanted))
    if pairs is None:
        hit = 0.25 * (1 - chances) ** 2 * -(chances + 1e-8).log()
        miss = 0.75 * chances**2 * -(1 - chances + 1e-8).log()
        cost = config.class_cost * (hit - miss)[:, classes] + config.bbox_cost * torch.cdist(boxes, wanted, p=1)
        cost = cost - config.giou_cost * torchvision.ops.generalized_box_iou(corners, goals)
        pairs = list(zip(*linear_sum_assignment(cost.detach().numpy()), strict=True))
    positive = torch.zeros_like(chances, dtype=torch.bool)
    for row, i in pairs:
        positive[row, classes[i]] = True
    alpha = config.focal_alpha
    focal = torch.where(
        positive, -alpha * (1 - chances) ** 2 * chances.log(), -(1 - alpha) * chances**2 * (1 - chances).log()
    )
    total = config.class_loss_coefficient * focal.sum()
    for row, i in pairs:
        giou = torchvision.ops.generalized_box_iou(corners[row : row + 1], goals[i : i + 1])
        total = total + config.bbox_loss_coefficient * (boxes[row] - wanted[i]).abs().sum()
        total = total + config.giou_loss_coefficient * (1 - giou.sum())
    return total


OTHER_WEIGHTS = {
    "class_cost": 1,
    "bbox_cost": 3,
    "giou_cost": 4,
    "class_loss_coefficient": 3,
    "bbox_loss_coefficient": 2,
    "giou_loss_coefficient": 7,
    "focal_alpha": 0.4,
}
LOSSES = pytest.mark.parametrize(
    ("boxes", "training", "weights"),
    [((2, 1), True, {}), ((3, 0), True, OTHER_WEIGHTS), ((9, 1), True, {}), ((0, 0), True, {}), ((2, 1), False, {})],
)


@LOSSES
def test_the_loss_is_that_of_the_formulas_and_so_is_its_gradient(build: Build, boxes, training, weights) -> None:
    model = build("dino_detr", **weights).train(training).requires_grad_(True)
    inputs = tiny.batch(128, boxes=boxes)
    output = run(model, inputs)
    expected = naive_loss(output, inputs["labels"], model.config)
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=0)
    read = [output[name] for name in (*DECODED[:2], "enc_topk_logits", "enc_topk_bboxes")]
    assert_same_gradients(gradients(output.loss, read), gradients(expected, read), 1e-5)
    assert all(gradient.any() for gradient in gradients(output.loss, model.model.input_proj))


@LOSSES
def test_the_loss_is_that_of_the_criterion_of_distillation(build: Build, boxes, training, weights) -> None:
    model = build("dino_detr", **weights).train(training).requires_grad_(True)
    inputs = tiny.batch(128, boxes=boxes)
    output = run(model, inputs)
    torch.manual_seed(0)
    ours = adapter_for(model)(inputs["pixel_values"], targets=Targets.from_labels(inputs["labels"]))[0]
    torch.testing.assert_close(output.loss, ours.loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(output.loss, model), gradients(ours.loss, model), 1e-3)
    torch.testing.assert_close(output.loss, sum(output.loss_dict.values()))
