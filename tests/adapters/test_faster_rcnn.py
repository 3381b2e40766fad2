"""Faster R-CNN in the two verbs: what it is asked by itself, what others ask it, and what its loss compares."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou, roi_align
from transformers import DetrConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from hf_detrkd.adapters import DetectorAdapter, adapter_for, spec_for
from hf_detrkd.evaluation import CocoBoxMetric, detections_from_predictions
from hf_detrkd.initialization import freeze_stages
from hf_detrkd.models import FasterRCNNForObjectDetection
from hf_detrkd.outputs import DetectorOutput, ObjectQueries, Predictions, Targets
from hf_detrkd.students import build_student, load_image_processor, load_student, with_classes
from tests import tiny
from tests.models.faster_rcnn import (
    MOBILENET,
    NO_PROPOSALS,
    RESNET,
    RESNET_V2,
    SIZES,
    SMALL,
    border_labels,
    build,
    config,
    corners,
    inputs_of,
    labels_of,
    photographs,
)
from tests.test_overfit import images as eight_images


WHOLE_IMAGE = torch.tensor([0.5, 0.5, 1.0, 1.0])
both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@pytest.fixture
def adapter() -> DetectorAdapter:
    return adapter_for(build())


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


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True), strict=True))


# --- detecting -------------------------------------------------------------------------------------------------------


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


# --- asking again ----------------------------------------------------------------------------------------------------


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


# --- training --------------------------------------------------------------------------------------------------------


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


# --- students --------------------------------------------------------------------------------------------------------


NEW = ["star", "moon", "circle"]  # two of them are in tiny.LABELS, in another order


@pytest.mark.parametrize("name", [SMALL, MOBILENET])
def test_rows_of_classes_with_the_same_name_are_kept_behind_the_background(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    student = load_student(str(tmp_path), NEW)
    assert type(student) is FasterRCNNForObjectDetection
    assert list(student.config.id2label.values()) == NEW and student.config.num_labels == 3
    old, new = model.state_dict(), student.state_dict()
    heads = {f"roi_heads.box_predictor.{part}": rows for part, rows in (("cls_score", 1), ("bbox_pred", 4))}
    for head, rows in heads.items():
        for kind in ("weight", "bias"):
            before, after = old[f"{head}.{kind}"], new[f"{head}.{kind}"]
            assert len(after) == 4 * rows
            sources = {0: 0, 1: 1 + tiny.LABELS.index("star"), 3: 1 + tiny.LABELS.index("circle")}
            for index, source in sources.items():
                for row in range(rows):
                    assert torch.equal(after[index * rows + row], before[source * rows + row]), (head, index)
            moon = after[2 * rows : 3 * rows]
            assert not any(torch.equal(moon, before[i * rows : (i + 1) * rows]) for i in range(6))
    for key, value in new.items():
        assert key.rsplit(".", 1)[0] in heads or torch.equal(value, old[key]), key


@torch.no_grad()
def test_kept_classes_are_answered_as_before():
    teacher = build()
    student, queries = with_classes(teacher, NEW).eval(), foreign()
    (old,), (new,) = (run(adapter_for(model))[0].decode(queries) for model in (teacher, student))
    for index, source in ((0, tiny.LABELS.index("star")), (2, tiny.LABELS.index("circle")), (-1, -1)):
        torch.testing.assert_close(new.logits[..., index], old.logits[..., source])
        if index >= 0:
            torch.testing.assert_close(new.class_boxes[:, :, index], old.class_boxes[:, :, source])
    assert with_classes(teacher, tiny.LABELS) is teacher


@pytest.mark.parametrize("name", [SMALL, MOBILENET])
def test_a_student_from_a_config_file_and_its_image_processor(name, tmp_path: Path):
    file = tmp_path / "student.json"
    file.write_text(json.dumps(config(name).to_dict()))
    model = build_student(str(file), ["a", "b"])
    assert type(model) is FasterRCNNForObjectDetection and model.config.label2id == {"a": 0, "b": 1}
    assert model.roi_heads.box_predictor.cls_score.out_features == 3
    assert model.config.level_widths == config(name).level_widths
    assert model.roi_heads.score_thresh == 0.0
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all((norm.weight == 1).all() for norm in norms)
    processor = load_image_processor(model, image_size=(64, 96), keep_aspect_ratio=True)
    assert type(processor) is IMAGE_PROCESSOR_MAPPING[DetrConfig]["torchvision"]
    assert dict(processor.size) == {"shortest_edge": 64, "longest_edge": 96} and processor.do_pad
    batch = processor([torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in SIZES], return_tensors="pt")
    output = run(adapter_for(model.eval()), dict(batch))[0]
    assert output.found.logits.shape == (3, 100, 3)
    assert output.features["neck"][0].padding.any()


@pytest.mark.parametrize("name", [SMALL, RESNET, MOBILENET])
def test_backbone_parameters_are_those_of_the_body_and_no_others(name):
    model = FasterRCNNForObjectDetection(config(name))
    own = {id(parameter) for parameter in model.backbone.body.parameters()}
    found = {parameter_name for parameter_name, _ in adapter_for(model).backbone_parameters()}
    assert found == {name for name, parameter in model.named_parameters() if id(parameter) in own} != set()


@pytest.mark.parametrize("name", [SMALL, RESNET])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_stem_and_first_stages_can_be_frozen(name, number):
    model = FasterRCNNForObjectDetection(config(name))
    frozen = freeze_stages(model, number)
    body = model.backbone.body
    parts = [[body.conv1, body.bn1], [body.layer1], [body.layer2]][:number]
    own = {id(parameter) for modules in parts for module in modules for parameter in module.parameters()}
    wanted = {name for name, parameter in model.named_parameters() if id(parameter) in own}
    assert set(frozen) == wanted == {key for key, value in model.named_parameters() if not value.requires_grad}


def test_a_backbone_without_such_stages_is_refused():
    model = FasterRCNNForObjectDetection(config(MOBILENET))
    with pytest.raises(ValueError, match="the backbone of this faster_rcnn has no part 0"):
        freeze_stages(model, 1)


# --- learning --------------------------------------------------------------------------------------------------------


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
