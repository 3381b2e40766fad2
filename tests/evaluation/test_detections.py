"""From models and labels to the metric: detections, references, and the evaluator that reads padded batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DeformableDetrImageProcessor, DetrImageProcessor, EvalPrediction, RTDetrImageProcessor

from hf_detrkd.evaluation import (
    CocoEvaluator,
    detections_from_predictions,
    gatherable,
    predictions_from_heads,
    references_from_labels,
)
from hf_detrkd.structures.outputs import Predictions
from tests.evaluation.boxes import figures_of


def random_answers(num_queries, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, num_queries, columns, generator=generator)
    boxes = torch.rand(3, num_queries, 4, generator=generator)
    return logits, boxes, torch.tensor([[480, 640], [33, 7], [1000, 999]])


@pytest.mark.parametrize("num_queries, num_classes", [(300, 80), (100, 3), (30, 5)])
def test_sigmoid_detections_are_those_of_the_processors(num_queries, num_classes):
    logits, boxes, sizes = random_answers(num_queries, num_classes, seed=num_queries)
    ours = detections_from_predictions(Predictions(logits, boxes), sizes, 100)
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    for processor in (DeformableDetrImageProcessor(), RTDetrImageProcessor()):
        theirs = processor.post_process_object_detection(outputs, threshold=0, target_sizes=sizes)
        for image, expected in zip(ours, theirs, strict=True):
            count = min(100, len(expected["scores"]))  # RT-DETR's keeps no more than it has queries
            assert all(torch.equal(image[key][:count], expected[key][:count]) for key in expected)


@pytest.mark.parametrize("num_queries", [300, 100, 30])
def test_softmax_detections_are_the_best_of_the_processor(num_queries):
    logits, boxes, sizes = random_answers(num_queries, 6, seed=num_queries)
    ours = detections_from_predictions(Predictions(logits, boxes, activation="softmax"), sizes, 100)
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    theirs = DetrImageProcessor().post_process_object_detection(outputs, threshold=0, target_sizes=sizes)
    for image, expected in zip(ours, theirs, strict=True):
        best = expected["scores"].argsort(descending=True)[:100]
        assert all(torch.equal(image[key], expected[key][best]) for key in expected)


def test_detections_refuse_sizes_of_another_batch():
    logits, boxes, sizes = random_answers(5, 2, seed=0)
    with pytest.raises(ValueError, match=r"\(height, width\) of 3 images, got shape \(2, 2\)"):
        detections_from_predictions(Predictions(logits, boxes), sizes[:2])


def label(image_id, num_boxes, **more):
    generator = torch.Generator().manual_seed(image_id)
    return {
        "image_id": torch.tensor([image_id]),
        "class_labels": torch.randint(0, 2, (num_boxes,), generator=generator),
        "boxes": torch.rand(num_boxes, 4, generator=generator) * 0.4 + 0.1,
        "orig_size": torch.tensor([100, 200]),
        **more,
    }


def test_references_are_in_pixels_of_the_original_image():
    truth = label(4, 1, boxes=torch.tensor([[0.5, 0.5, 0.1, 0.4]]), class_labels=torch.tensor([1]))
    (image,) = references_from_labels([truth])
    assert {name: value.tolist() for name, value in image.items()} == {
        "image_id": 4,
        "boxes": [pytest.approx([90, 30, 110, 70])],
        "labels": [1],
        "area": [pytest.approx(800)],
        "iscrowd": [0],
    }


def test_references_hold_crowds_and_keep_given_areas():
    crowd = {
        "crowd_boxes": torch.tensor([[0.25, 0.25, 0.5, 0.5]]),
        "crowd_labels": torch.tensor([1]),
        "crowd_area": torch.tensor([77.0]),
    }
    (image,) = references_from_labels([label(4, 2, area=torch.tensor([11.0, 12.0]), **crowd)])
    assert image["area"].tolist() == [11, 12, 77]
    assert image["iscrowd"].tolist() == [0, 0, 1]
    assert image["labels"].tolist()[2] == 1
    assert image["boxes"][2].tolist() == pytest.approx([0, 0, 100, 50])


def test_columns_tell_the_activation():
    logits, boxes, _ = random_answers(5, 4, seed=0)
    assert predictions_from_heads(logits, boxes, 4).activation == "sigmoid"
    softmax = predictions_from_heads(logits, boxes, 3)
    assert softmax.activation == "softmax" and softmax.num_classes == 3


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_nothing_of_a_batch_is_read_on_the_host(activation):
    with torch.device("meta"):  # has shapes but no values: whatever asks for one raises
        labels = [label_without_values(count) for count in (0, 3)]
        answers = Predictions(torch.ones(2, 300, 6), torch.ones(2, 300, 4), activation=activation)
        detections = detections_from_predictions(answers, torch.stack([x["orig_size"] for x in labels]), 100)
        found, truth = gatherable(detections, references_from_labels(labels))
    assert found["boxes"].shape == (2, 100, 4) and truth["boxes"].shape == (2, 4, 4)


def label_without_values(num_boxes):
    return {
        "image_id": torch.ones(1, dtype=torch.int64),
        "class_labels": torch.ones(num_boxes, dtype=torch.int64),
        "boxes": torch.ones(num_boxes, 4),
        "orig_size": torch.ones(2, dtype=torch.int64),
        "crowd_boxes": torch.ones(1, 4),
        "crowd_labels": torch.ones(1, dtype=torch.int64),
        "crowd_area": torch.ones(1),
    }


@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (1, 3)])
def test_padding_changes_no_figure(counts):
    labels = [label(i, count) for i, count in enumerate(counts)]
    detections = [
        {"boxes": truth["boxes"] + 3, "scores": torch.rand(len(truth["boxes"])), "labels": truth["labels"]}
        for truth in references_from_labels(labels)
    ]
    padded = gatherable(detections, references_from_labels(labels))
    assert padded[1]["boxes"].shape == (2, max(1, *counts), 4)
    direct = [
        ({"image_id": i, **found}, truth)
        for i, (found, truth) in enumerate(zip(detections, references_from_labels(labels), strict=True))
    ]
    assert CocoEvaluator({0: "cat", 1: "dog"})(EvalPrediction(*padded)) == figures_of({0: "cat", 1: "dog"}, *direct)


def test_evaluator_starts_anew_after_its_figures_and_on_reset():
    def batch(image_id, shift):
        truth = references_from_labels([label(image_id, 2)])
        found = [{"boxes": truth[0]["boxes"] + shift, "scores": torch.ones(2), "labels": truth[0]["labels"]}]
        return EvalPrediction(*gatherable(found, truth))

    evaluator = CocoEvaluator({0: "cat", 1: "dog"})
    assert evaluator(batch(1, shift=90), compute_result=False) == {}
    folder = Path(evaluator.metric.data_dir)
    assert folder.exists()
    assert evaluator(batch(2, shift=0), compute_result=True)["map"] < 0.9
    assert not folder.exists()
    assert evaluator(batch(2, shift=0), compute_result=True)["map"] == pytest.approx(1.0)
    evaluator(batch(1, shift=90), compute_result=False)
    evaluator.reset()
    assert evaluator(batch(2, shift=0), compute_result=True)["map"] == pytest.approx(1.0)


def test_evaluator_keeps_the_curves_of_its_last_figures():
    truth = references_from_labels([label(2, 2)])
    found = [{"boxes": truth[0]["boxes"], "scores": torch.ones(2), "labels": truth[0]["labels"]}]
    evaluator = CocoEvaluator({0: "cat", 1: "dog"})
    evaluator(EvalPrediction(*gatherable(found, truth)), compute_result=False)
    assert evaluator.precision == {}
    evaluator(EvalPrediction(*gatherable(found, truth)), compute_result=True)
    seen = {("cat", "dog")[number] for number in truth[0]["labels"].tolist()}
    perfect = {name: pytest.approx([1.0] * 101) for name in seen}
    assert evaluator.precision == {"50": perfect, "75": perfect}
    evaluator.reset()
    assert evaluator.precision["50"] == perfect


def test_evaluator_refuses_what_was_gathered_as_objects():
    with pytest.raises(ValueError, match="padded tensors of `gatherable`, got list and list"):
        CocoEvaluator({0: "cat"})(EvalPrediction([{}], [{}]), compute_result=True)
