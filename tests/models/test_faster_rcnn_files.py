"""Faster R-CNN saved and loaded, here and where the package is not, and in sixteen bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForObjectDetection

from hf_detrkd.models import FasterRCNNForObjectDetection
from tests.models.apart import answers_apart
from tests.models.faster_rcnn import build, corners, inputs_of, photographs


@torch.no_grad()
def test_a_saved_model_is_the_same_here_and_where_the_package_is_not(tmp_path):
    model, inputs = build(), inputs_of(photographs())
    model.save_pretrained(tmp_path / "saved")
    expected = model(**inputs)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path / "saved")
    assert type(loaded) is FasterRCNNForObjectDetection and not loaded.training
    assert loaded.config.to_dict() == {**model.config.to_dict(), **changed_by_saving(loaded)}
    found = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, found[name]), name
    output = loaded(**inputs)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.pred_boxes, expected.pred_boxes)

    logits, boxes = answers_apart(tmp_path, inputs)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(boxes, expected.pred_boxes)


def changed_by_saving(model: FasterRCNNForObjectDetection) -> dict[str, Any]:
    return {key: model.config.to_dict()[key] for key in ("_name_or_path", "architectures", "auto_map", "dtype")}


@torch.no_grad()
def test_under_bf16_autocast_most_boxes_stay_within_a_pixel():
    model, inputs = build(rpn_post_nms_top_n_test=1000), inputs_of(photographs([(480, 640)]))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            encoded = model.encode(**inputs)
            (proposals,) = model.propose(encoded)[0]
            _, boxes = model.detect(encoded, [proposals])
        assert proposals.dtype == boxes.dtype == torch.float32
        found.append((proposals, corners(boxes[0], (480, 640))))
    for exact, rounded in zip(*found, strict=True):
        nearest = (exact[:100, None] - rounded).abs().amax(-1).amin(1)
        assert exact.abs().max() > 400
        assert (nearest < 1).float().mean() > 0.8, nearest.sort().values
    assert not torch.equal(*(proposals for proposals, _ in found))  # autocast did something


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_weights_of_sixteen_bits_leave_proposals_and_heads_in_float32(tmp_path, dtype):
    source, images = build(box_score_thresh=0.05), photographs()
    source.save_pretrained(tmp_path)
    model = AutoModelForObjectDetection.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.backbone.parameters()} == {dtype}
    assert {p.dtype for p in (*model.rpn.parameters(), *model.roi_heads.parameters())} == {torch.float32}
    inputs = inputs_of(images)
    found = model(**inputs | {"pixel_values": inputs["pixel_values"].to(dtype)})
    assert found.logits.dtype == found.pred_boxes.dtype == torch.float32 and found.logits.isfinite().all()
