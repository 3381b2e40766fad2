"""Detections of Faster R-CNN, its own queries, and its features."""

from __future__ import annotations

import pytest
import torch

from hf_detrkd.adapters import adapter_for, spec_for
from tests import tiny
from tests.adapters.faster_rcnn.passes import WHOLE_IMAGE, run
from tests.models.faster_rcnn import NO_PROPOSALS, SIZES, build, corners, inputs_of, photographs


@pytest.mark.parametrize("options", [{}, {"box_score_thresh": 0.8}, NO_PROPOSALS], ids=str)
@torch.no_grad()
def test_what_is_found_is_what_the_model_finds(options):
    adapter, inputs = adapter_for(build(**options)), inputs_of(photographs())
    expected, (output, losses) = adapter.model(**inputs), run(adapter, inputs)
    assert torch.equal(output.found.logits, expected.logits) and torch.equal(output.found.boxes, expected.pred_boxes)
    assert output.found.activation == "softmax" and output.found.num_classes == tiny.NUM_CLASSES
    assert output.loss is None and output.proposals is None and not losses


@torch.no_grad()
def test_the_spec_from_a_config_alone_describes_the_pass(adapter):
    output, spec = run(adapter)[0], adapter.spec
    assert spec == spec_for(adapter.model.config)
    assert spec.family == "faster_rcnn" and not spec.one_to_one and spec.query_fields == {"boxes"}
    assert (spec.num_layers, spec.num_queries, spec.num_classes) == (1, 100, tiny.NUM_CLASSES)
    assert len(output.layers) == 1 and output.layers[0].hidden_states.shape == (3, 100, spec.width)
    assert output.layers[0].activation == spec.activation == "softmax"
    assert output.layers[0].logits.shape == (3, 100, tiny.NUM_CLASSES + 1)
    assert output.queries.fields == {"boxes"} and output.queries.size == spec.num_queries
    found = {place: tuple(level.values.shape[1] for level in maps) for place, maps in output.features.items()}
    assert found == spec.features


@torch.no_grad()
def test_boxes_are_those_of_the_best_class_and_others_can_be_asked_for(adapter):
    answers = run(adapter)[0].layers[0]
    assert answers.class_boxes.shape == (3, 100, tiny.NUM_CLASSES, 4)
    wanted = torch.randint(0, tiny.NUM_CLASSES, (3, 100))
    others, best = answers.boxes_of(wanted), []
    for image in range(3):
        for row in range(100):
            scores = answers.scores()[image, row].tolist()
            best.append(scores.index(max(scores)))
            assert torch.equal(answers.boxes[image, row], answers.class_boxes[image, row, best[-1]])
            assert torch.equal(others[image, row], answers.class_boxes[image, row, wanted[image, row]])
    assert len(set(best)) > 2
    assert (answers.class_boxes[:, :, 0] - answers.class_boxes[:, :, 1]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_it_asks_itself_about_its_detections_and_then_about_its_best_proposals():
    adapter, inputs = adapter_for(build(box_score_thresh=0.8)), inputs_of(photographs())
    output = run(adapter, inputs)[0]
    proposals, _ = adapter.model.propose(adapter.model.encode(**inputs))
    for image, (size, proposed) in enumerate(zip(SIZES, proposals, strict=True)):
        places = output.queries.boxes[image]
        count = int((output.found.scores()[image].amax(-1) > 0).sum())
        assert 0 < count < len(proposed) < 100
        assert torch.equal(places[:count], output.found.boxes[image, :count])
        torch.testing.assert_close(corners(places[count : len(proposed)], size), proposed[count:], atol=1e-3, rtol=0)
        assert (places[len(proposed) :] == WHOLE_IMAGE).all()


@torch.no_grad()
def test_without_proposals_it_asks_about_whole_images_and_finds_nothing():
    adapter = adapter_for(build(**NO_PROPOSALS))
    output = run(adapter)[0]
    assert (output.queries.boxes == WHOLE_IMAGE).all() and not output.found.scores().any()
    for image in range(3):
        assert len(output.layers[0].logits[image].unique(dim=0)) == 1
    assert output.layers[0].logits.isfinite().all() and output.layers[0].scores().any()


@torch.no_grad()
def test_features_are_the_levels_that_boxes_are_pooled_from_with_their_padding(adapter):
    inputs = inputs_of(photographs())
    output = run(adapter, inputs)[0]
    pyramid = list(adapter.model.backbone(inputs["pixel_values"]).values())
    assert output.features["neck"] is output.features["encoder"] and len(output.features["neck"]) == 4
    for level, values, stride in zip(output.features["neck"], pyramid, (4, 8, 16, 32), strict=False):
        assert torch.equal(level.values, values) and level.padding.dtype == torch.bool
        for image, (height, width) in enumerate(SIZES):
            for y in range(96 // stride):
                for x in range(96 // stride):  # where a cell begins
                    assert level.padding[image, y, x] == (y * stride >= height or x * stride >= width)


@torch.no_grad()
def test_nothing_is_flagged_where_nothing_is_padded(adapter):
    (plain, _), (filled, _) = (
        run(adapter, inputs_of(photographs([size]), masked=False)) for size in ((64, 96), (64, 70))
    )
    assert all(level.padding is None for level in plain.features["neck"])
    assert not filled.features["neck"][0].padding[0, :, :17].any()
    assert filled.features["neck"][0].padding[0, :, 18:].all()
