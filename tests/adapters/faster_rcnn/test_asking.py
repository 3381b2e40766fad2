"""Faster R-CNN asked about any boxes: answers as a loop computes them, gradients, no side effects."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, roi_align

from hf_detrkd.adapters import adapter_for
from hf_detrkd.models import FasterRCNNForObjectDetection
from hf_detrkd.structures.outputs import DetectorOutput, ObjectQueries
from tests import tiny
from tests.adapters.contract import both_modes, gradients
from tests.adapters.faster_rcnn.passes import (
    WHOLE_IMAGE,
    assert_same,
    differ,
    foreign,
    run,
    some_loss,
)
from tests.models.faster_rcnn import RESNET_V2, SIZES, border_labels, build, config, corners, inputs_of, photographs


def test_own_queries_asked_again_give_the_same_answer_and_gradient(adapter):
    output = run(adapter)[0]
    (again,) = output.decode(output.queries)
    assert_same(again, output.layers[0])
    first, second = (gradients(adapter.model, some_loss(answers)) for answers in (output.layers[0], again))
    for name, gradient in first.items():
        assert (gradient is None) == (second[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(second[name], gradient, atol=1e-3 * gradient.abs().max().item(), rtol=1e-3)


def test_samples_of_the_loss_asked_again_give_the_same_answer(adapter):
    adapter.model.train()
    output = run(adapter, labels=border_labels())[0]
    (again,), valid = output.decode(output.queries), output.proposals.valid
    assert valid.sum(1).min() > 50
    for name in ("logits", "hidden_states", "class_boxes", "boxes"):
        first, second = getattr(output.layers[0], name)[valid], getattr(again, name)[valid]
        torch.testing.assert_close(second, first, atol=1e-4, rtol=1e-4)


def naive_answer(
    model: FasterRCNNForObjectDetection, pyramid: Sequence[Tensor], box: Tensor, size: tuple[int, int]
) -> tuple[int, Tensor, Tensor, Tensor]:
    """The level that a box is pooled from, and its state, logits (background last) and boxes of the classes."""
    height, width = size
    place = corners(box, size)
    x0, y0, x1, y1 = place.tolist()
    level = math.floor(4 + math.log2(math.sqrt((x1 - x0) * (y1 - y0)) / 224))
    level = min(max(level, 2), 5) - 2
    pooled = roi_align(pyramid[level][None], [place[None]], 7, spatial_scale=1 / (4 * 2**level), sampling_ratio=2)
    state = model.roi_heads.box_head(pooled)
    logits, deltas = (values[0] for values in model.roi_heads.box_predictor(state))
    boxes = []
    for index in range(tiny.NUM_CLASSES):
        dx, dy, dw, dh = deltas[4 * (index + 1) : 4 * (index + 2)].tolist()
        center_x, center_y = (x0 + x1) / 2 + dx / 10 * (x1 - x0), (y0 + y1) / 2 + dy / 10 * (y1 - y0)
        half_w, half_h = (x1 - x0) / 2 * math.exp(dw / 5), (y1 - y0) / 2 * math.exp(dh / 5)
        left, right = (min(max(x, 0), width) / width for x in (center_x - half_w, center_x + half_w))
        top, bottom = (min(max(y, 0), height) / height for y in (center_y - half_h, center_y + half_h))
        boxes.append([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
    return level, state[0], torch.cat([logits[1:], logits[:1]]), torch.tensor(boxes)


@pytest.mark.parametrize(
    ("sizes", "expected"), [([(250, 300), (180, 310)], {0, 1, 2}), ([(20, 20), (17, 20)], {0})], ids=["large", "small"]
)
@torch.no_grad()
def test_an_answer_is_pooled_at_its_place_in_the_image_and_not_in_the_padded_canvas(adapter, sizes, expected):
    inputs, queries = inputs_of(photographs(sizes)), foreign(8, 2)
    queries.boxes[:, 0] = WHOLE_IMAGE
    queries.boxes[:, 1, 2:] = 0.55
    queries.boxes[:, 1, :2] = 0.45
    (answers,) = run(adapter, inputs)[0].decode(queries)
    height, width = inputs["pixel_values"].shape[-2:]
    canvas = F.pad(inputs["pixel_values"], (0, -width % 32, 0, -height % 32))
    pyramid, levels = list(adapter.model.backbone(canvas).values()), set()
    for image, size in enumerate(sizes):
        for row in range(8):
            level, state, logits, boxes = naive_answer(
                adapter.model, [values[image] for values in pyramid], queries.boxes[image, row], size
            )
            levels.add(level)
            torch.testing.assert_close(answers.hidden_states[image, row], state, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(answers.logits[image, row], logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(answers.class_boxes[image, row], boxes, atol=1e-5, rtol=0)
    assert levels == expected


@pytest.mark.parametrize("count", [1, 300])
@torch.no_grad()
def test_any_number_of_boxes_wherever_they_are_gets_an_answer(adapter, count):
    boxes = torch.rand(3, count, 4)  # some leave the image
    (answers,) = run(adapter)[0].decode(ObjectQueries(boxes=boxes))
    assert answers.logits.shape == (3, count, tiny.NUM_CLASSES + 1)
    assert answers.logits.isfinite().all() and answers.class_boxes.isfinite().all()
    edges = box_convert(answers.class_boxes, "cxcywh", "xyxy")
    assert edges.min() >= -1e-6 and edges.max() <= 1 + 1e-6


@torch.no_grad()
def test_of_a_box_that_leaves_the_image_the_part_inside_is_asked(adapter):
    output = run(adapter)[0]
    leaving, inside = torch.tensor([[[0.9, 0.5, 0.4, 0.2]], [[0.85, 0.5, 0.3, 0.2]]]).expand(2, 3, -1).unsqueeze(2)
    (first,), (second,) = (output.decode(ObjectQueries(boxes=boxes)) for boxes in (leaving, inside))
    assert_same(first, second)


@both_modes
def test_foreign_queries_leave_buffers_detections_loss_and_gradients_alone(training):
    def outcome(asked: bool) -> tuple[DetectorOutput, dict[str, Tensor | None], dict[str, Tensor]]:
        adapter = adapter_for(build().train(training))
        output = run(adapter, labels=border_labels())[0]
        before = {name: value.clone() for name, value in adapter.model.named_buffers()}
        if asked:
            output.decode(foreign(300))
            output.decode(foreign(1))
        assert all(torch.equal(value, before[name]) for name, value in adapter.model.named_buffers())
        return output, gradients(adapter.model, output.loss), before

    (alone, expected, before), (output, found, after) = outcome(False), outcome(True)
    assert torch.equal(output.found.logits, alone.found.logits) and torch.equal(output.found.boxes, alone.found.boxes)
    assert torch.equal(output.loss, alone.loss)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for name, gradient in expected.items():
        assert gradient is not None and torch.equal(gradient, found[name]), name


@both_modes
@torch.no_grad()
def test_a_pass_leaves_the_mode_of_every_module_as_it_was(adapter, training):
    adapter.model.train(training)
    for labels in (border_labels(), None):
        run(adapter, labels=labels)
        assert all(module.training == training for module in adapter.model.modules())


@both_modes
@torch.no_grad()
def test_a_head_with_batch_norm_answers_foreign_queries_one_by_one_and_keeps_its_statistics(training):
    options = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 10}
    adapter = adapter_for(FasterRCNNForObjectDetection(config(RESNET_V2, **options)).train(training))
    labels = border_labels()[:1]
    output = run(adapter, inputs_of(photographs(SIZES[:1])), labels)[0]
    before = {name: value.clone() for name, value in adapter.model.named_buffers()}
    queries = foreign(6, 1)
    (together,), (alone,) = output.decode(queries), output.decode(ObjectQueries(boxes=queries.boxes[:, :2]))
    assert_same(alone, together.rows(0, 2))
    assert all(module.training == training for module in adapter.model.modules())
    assert all(torch.equal(value, before[name]) for name, value in adapter.model.named_buffers())


@torch.no_grad()
def test_queries_do_not_see_each_other(adapter):
    output, queries = run(adapter)[0], foreign(8)
    (together,) = output.decode(queries)
    (some,) = output.decode(ObjectQueries(boxes=queries.boxes[:, [5, 2]]))
    (grouped,) = output.decode(ObjectQueries(boxes=queries.boxes, groups=torch.arange(8).expand(3, -1) // 3))
    assert_same(grouped, together)
    for row, index in enumerate((5, 2)):
        assert_same(some.rows(row, row + 1), together.rows(index, index + 1))
    assert differ(together.rows(5, 6), together.rows(2, 3))


@torch.no_grad()
def test_each_pass_is_asked_about_its_own_images(adapter):
    first, queries = run(adapter)[0], foreign()
    (answer,) = first.decode(queries)
    second = run(adapter, inputs_of(photographs(seed=5)))[0]
    assert differ(second.decode(queries)[0], answer)
    assert_same(first.decode(queries)[0], answer)


@both_modes
def test_gradients_of_a_foreign_query_reach_backbone_pyramid_and_head_and_nothing_else(adapter, training):
    adapter.model.train(training)
    output = run(adapter, labels=border_labels())[0]
    places = foreign().boxes.requires_grad_()
    (answers,) = output.decode(ObjectQueries(boxes=places))
    found = gradients(adapter.model, some_loss(answers))
    assert torch.autograd.grad(some_loss(answers), places, allow_unused=True)[0] is None
    reached = {name for name, gradient in found.items() if gradient is not None and gradient.any()}
    pooled = ("backbone.fpn.inner_blocks.", "backbone.fpn.layer_blocks.0.")  # small boxes are pooled from the finest
    wanted = {name for name in found if name.startswith(("backbone.body.", "roi_heads.", *pooled))}
    assert wanted <= reached and len(wanted) > 60
    assert not any(name.startswith("rpn.") for name in reached)


def test_queries_without_boxes_are_refused_by_name(adapter):
    output = run(adapter)[0]
    with pytest.raises(ValueError, match=r"faster_rcnn queries need `boxes`, got only \['content', 'points'\]"):
        output.decode(ObjectQueries(content=torch.randn(3, 4, 64), points=torch.rand(3, 4, 2)))


@both_modes
def test_a_single_image_has_the_gradients_of_a_batch(adapter, training):
    adapter.model.train(training)
    found = []
    for copies in (1, 2):
        inputs = {name: torch.cat([value] * copies) for name, value in inputs_of(photographs(SIZES[:1])).items()}
        (answers,) = run(adapter, inputs)[0].decode(ObjectQueries(boxes=foreign(4, 1).boxes.expand(copies, -1, -1)))
        found.append(gradients(adapter.model, some_loss(answers) / copies))
    for name, gradient in found[0].items():
        if gradient is not None:
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[1][name], gradient, atol=2e-3 * scale + 1e-6, rtol=1e-2)
