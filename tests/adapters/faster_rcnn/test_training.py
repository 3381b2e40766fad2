"""Faster R-CNN in training: its labelled proposals, its loss, and that it learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from hf_detrkd.adapters import DetectorAdapter, adapter_for
from hf_detrkd.evaluation import CocoBoxMetric, detections_from_predictions
from hf_detrkd.models import FasterRCNNForObjectDetection
from hf_detrkd.structures.targets import Targets
from tests import tiny
from tests.adapters.contract import both_modes, gradients
from tests.adapters.faster_rcnn.passes import foreign, run, some_loss
from tests.models.faster_rcnn import (
    NO_PROPOSALS,
    SIZES,
    border_labels,
    build,
    config,
    corners,
    inputs_of,
    labels_of,
    photographs,
)
from tests.overfit import images as eight_images


def targets_of(counts: Sequence[int]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [tiny.random_label(count, generator) for count in counts]


@torch.no_grad()
def test_proposals_are_labelled_by_their_overlap_with_the_ground_truth():
    adapter = adapter_for(build(rpn_post_nms_top_n_train=200).train())
    labels = targets_of((12, 5, 0))
    output = run(adapter, labels=labels)[0]
    proposals, learned = output.proposals, 0
    assert torch.equal(output.queries.boxes, proposals.boxes)
    counts = proposals.valid.sum(1)
    assert counts.unique().numel() > 1 and counts.max() == proposals.valid.shape[1]
    for image, (label, size) in enumerate(zip(labels, SIZES, strict=True)):
        count = int(counts[image])
        assert proposals.valid[image, :count].all() and not proposals.valid[image, count:].any()
        assert not proposals.foreground[image, count:].any() and not proposals.added[image, count:].any()
        assert (proposals.labels[image, count:] == -1).all()
        truth, classes = corners(label["boxes"], size), label["class_labels"]
        for row in range(count):
            box = proposals.boxes[image, row]
            overlaps = box_iou(corners(box, size)[None], truth)[0].tolist()
            best = max(overlaps, default=0.0)
            if abs(best - 0.5) < 1e-4:
                continue
            if best < 0.5:
                assert proposals.labels[image, row] == -1 and not proposals.foreground[image, row]
                continue
            matched = overlaps.index(best)
            assert proposals.labels[image, row] == classes[matched] and proposals.foreground[image, row]
            torch.testing.assert_close(proposals.matched[image, row], label["boxes"][matched], atol=1e-6, rtol=0)
            learned += int(best < 0.999)
        added = proposals.boxes[image][proposals.added[image]]
        torch.testing.assert_close(added, label["boxes"], atol=1e-6, rtol=0)
        identical = (proposals.boxes[image, :count, None] - label["boxes"]).abs().amax(-1) < 1e-6
        assert torch.equal(proposals.added[image, :count], identical.any(1))
    assert learned > 3


def test_the_loss_is_the_sum_of_its_parts_and_the_model_s_own(adapter):
    for training in (True, False):
        adapter.model.train(training)
        output, losses = run(adapter, labels=border_labels())
        torch.manual_seed(0)
        expected = adapter.model(**inputs_of(photographs()), labels=border_labels())
        assert losses.keys() == expected.loss_dict.keys() == {"classifier", "box_reg", "objectness", "rpn_box_reg"}
        torch.testing.assert_close(output.loss, sum(losses.values()))
        torch.testing.assert_close(output.loss, expected.loss)
        for name, value in losses.items():
            torch.testing.assert_close(value, expected.loss_dict[name])
        assert (output.proposals is None) != training and (output.detections is None) == training


def test_what_is_learnt_from_is_what_the_loss_was_computed_on(adapter):
    adapter.model.train()
    output, losses = run(adapter, labels=targets_of((4, 1, 0)))
    answers, proposals = output.layers[0], output.proposals
    classes = proposals.labels.masked_fill(proposals.labels < 0, tiny.NUM_CLASSES)[proposals.valid]
    expected = F.cross_entropy(answers.logits[proposals.valid], classes)
    torch.testing.assert_close(losses["classifier"], expected)


@torch.no_grad()
def test_the_loss_of_an_evaluation_does_not_move_the_random_numbers_of_the_run():
    adapter = adapter_for(build(box_batch_size_per_image=16))
    inputs, targets, losses = inputs_of(photographs()), Targets.from_labels(border_labels()), []
    for training in (False, True):
        adapter.model.train(training)
        torch.manual_seed(7)
        before = torch.random.get_rng_state()
        losses.append(adapter(**inputs, targets=targets)[0].loss)
        assert torch.equal(torch.random.get_rng_state(), before) != training


@both_modes
@pytest.mark.parametrize("options", [{}, NO_PROPOSALS], ids=["proposals", "no proposals"])
def test_a_batch_without_boxes_can_be_learnt_from(options, training):
    adapter = adapter_for(build(**options).train(training))
    output, losses = run(adapter, labels=labels_of([], [], []))
    output.loss.backward()
    assert all(value.isfinite() for value in losses.values()) and losses["objectness"] > 0
    for name, parameter in adapter.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if training:
        assert not output.proposals.foreground.any() and not output.proposals.added.any()
        assert bool(options) != bool(output.proposals.valid.any())
    (answers,) = output.decode(foreign(3))
    assert answers.logits.isfinite().all() and answers.boxes.isfinite().all()


def test_bf16_autocast_keeps_answers_and_gradients_finite_and_in_float32(adapter):
    adapter.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        output = run(adapter, labels=border_labels())[0]
        (answers,) = output.decode(foreign())
    for one in (answers, output.layers[0]):
        assert one.logits.dtype == one.boxes.dtype == one.class_boxes.dtype == torch.float32
        assert one.logits.isfinite().all() and one.class_boxes.isfinite().all()
    (exact,) = run(adapter, labels=border_labels())[0].decode(foreign())
    assert (answers.class_boxes - exact.class_boxes).abs().max() < 0.05
    found = gradients(adapter.model, output.loss + some_loss(answers))
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.slow
def test_a_small_detector_learns_eight_images_by_heart():
    pixels, targets, classes = eight_images()
    options = {"box_score_thresh": 0.05, "box_batch_size_per_image": 64, "rpn_post_nms_top_n_train": 200}
    adapter = adapter_for(FasterRCNNForObjectDetection(config(labels=list(classes.values()), **options)))
    optimizer = torch.optim.AdamW(adapter.model.parameters(), 1e-3, weight_decay=0)
    losses, figure = [], 0.0
    for step in range(400):
        adapter.model.train()
        output, _ = adapter(pixels, targets=targets)
        losses.append(output.loss.item())
        if step % 25 == 0:
            figure = precision(adapter, pixels, targets, classes)
            if losses[-1] <= 0.2 * losses[0] and figure > 0.5:
                break
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(adapter.model.parameters(), 1.0)
        optimizer.step()
    assert losses[-1] <= 0.2 * losses[0] and figure > 0.5, (losses, figure)


@torch.no_grad()
def precision(adapter: DetectorAdapter, pixels: Tensor, targets: Targets, classes: dict[int, str]) -> float:
    """COCO's mAP on the images."""
    adapter.model.eval()
    size, metric = tuple(pixels.shape[-2:]), CocoBoxMetric(classes)
    found = detections_from_predictions(adapter(pixels)[0].found, [size] * len(pixels))
    truth: list[dict[str, Any]] = []
    for number, label in enumerate(targets.to_labels()):
        boxes = corners(label["boxes"], size)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        truth.append({"image_id": number, "boxes": boxes.tolist(), "labels": label["class_labels"].tolist()})
        truth[-1] |= {"area": area.tolist(), "iscrowd": [0] * len(boxes)}
    rows = [{"image_id": i, **{key: value.tolist() for key, value in own.items()}} for i, own in enumerate(found)]
    metric.add_batch(predictions=rows, references=truth)
    return metric.compute()["map"]
