"""Edge cases of Faster R-CNN: images without boxes, tiny boxes and images, calls with and without labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.faster_rcnn import NO_PROPOSALS, SIZES, border_labels, build, inputs_of, labels_of, photographs


EDGES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "an image without boxes": ({}, SIZES[:2], labels_of([(0.5, 0.5, 0.4, 0.4)], [])),
    "no box at all": ({}, SIZES[:2], labels_of([], [])),
    "no proposal": (NO_PROPOSALS, SIZES[:2], labels_of([(0.5, 0.5, 0.4, 0.4)], [(0.3, 0.3, 0.2, 0.2)])),
    "no proposal and no box": (NO_PROPOSALS, SIZES[:2], labels_of([], [])),
    "boxes of one pixel": (
        {},
        SIZES[:2],
        labels_of([(0.5, 0.5, 1 / 96, 1 / 64)], [(1 - 0.5 / 64, 0.5 / 96, 1 / 64, 1 / 96)]),
    ),
    "an image smaller than the stride": ({}, [(20, 27), (24, 17)], labels_of([(0.5, 0.5, 0.4, 0.4)], [])),
}


@pytest.mark.parametrize("edge", EDGES)
def test_losses_gradients_and_detections_stay_finite_with(edge):
    options, sizes, labels = EDGES[edge]
    model, inputs = build(**options), inputs_of(photographs(sizes))
    for training in (True, False):
        model.train(training).zero_grad()
        output = model(**inputs, labels=labels)
        assert all(value.isfinite() for value in output.loss_dict.values())
        output.loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert output.loss_dict["objectness"] > 0 and model.rpn.head.cls_logits.weight.grad.any()
    scores = output.logits.softmax(-1)[..., :-1]
    assert scores.isfinite().all() and output.pred_boxes.isfinite().all()
    assert scores.any() != edge.startswith("no proposal")
    assert output.pred_boxes[scores.amax(-1) > 0].ge(-1e-6).all() and output.pred_boxes.le(1 + 1e-6).all()


def test_losses_of_no_sample_are_zero_and_keep_the_graph():
    options, sizes, labels = EDGES["no proposal and no box"]
    model = build(**options).train()
    losses = model(**inputs_of(photographs(sizes)), labels=labels).loss_dict
    for part in ("classifier", "box_reg"):
        model.zero_grad()
        assert losses[part].item() == 0
        losses[part].backward(retain_graph=True)
        head = "cls_score" if part == "classifier" else "bbox_pred"
        gradient = model.roi_heads.box_predictor.get_submodule(head).weight.grad
        assert gradient is not None and not gradient.any()


def test_training_without_labels_is_refused():
    model = build().train()
    with pytest.raises(ValueError, match=r"in training mode needs labels: give them, or call eval\(\) to detect"):
        model(**inputs_of(photographs()))


@torch.no_grad()
def test_evaluation_with_labels_gives_loss_and_detections():
    model, inputs = build(), inputs_of(photographs())
    output, alone = model(**inputs, labels=border_labels()), model(**inputs)
    torch.testing.assert_close(output.loss, sum(output.loss_dict.values()))
    assert len(output.loss_dict) == 4 and output.loss > 0
    assert torch.equal(output.logits, alone.logits) and torch.equal(output.pred_boxes, alone.pred_boxes)
    assert len(model(**inputs, labels=border_labels()).to_tuple()) == 4
    logits, boxes = model(**inputs, return_dict=False)
    assert torch.equal(logits, alone.logits) and torch.equal(boxes, alone.pred_boxes)


def test_a_box_without_extent_has_finite_losses_and_gradients():
    model = build().train()
    labels = border_labels()
    labels[0]["boxes"][0, 2:] = 0
    model(**inputs_of(photographs()), labels=labels).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
