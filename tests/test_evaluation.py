"""COCO figures: against computations by hand and naive ones, the official ones, and through `Trainer`.

Run by torchrun this file is the worker of the tests with two processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tracemalloc
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.ops import box_convert, box_iou
from transformers import (
    DeformableDetrImageProcessor,
    DetrImageProcessor,
    EvalPrediction,
    RTDetrImageProcessor,
    Trainer,
    TrainingArguments,
)

from hf_detrkd.coco_files import evaluate_coco_files, read_coco_files
from hf_detrkd.evaluation import (
    FIGURES,
    CocoBoxMetric,
    CocoEvaluator,
    detections_from_predictions,
    gatherable,
    predictions_from_heads,
    references_from_labels,
)
from hf_detrkd.outputs import Predictions


REPOSITORY = Path(__file__).parents[1]
COCO_EVAL = Path(os.environ.get("HF_DETRKD_DATA", REPOSITORY.parent / "shared" / "data")) / "coco_eval"
ANNOTATIONS = COCO_EVAL / "instances_val2014_100.json"
DETECTIONS = COCO_EVAL / "instances_val2014_fakebbox100_results.json"
OFFICIAL = (
    *(0.5045806987249628, 0.6969727247299577, 0.5729816669904824),
    *(0.5856257209410443, 0.5193996948036719, 0.5013978986347466),
    *(0.38681277964578054, 0.5936795762842003, 0.595352982877607),
    *(0.6398109626113442, 0.5664205978994309, 0.5642905982905982),
)
needs_coco_eval = pytest.mark.skipif(not ANNOTATIONS.is_file(), reason=f"real data: {COCO_EVAL} is not there")


def prediction(image_id, boxes, scores, labels=None):
    return {"image_id": image_id, "boxes": boxes, "scores": scores, "labels": labels or [0] * len(boxes)}


def reference(image_id, boxes, labels=None, crowd=None):
    area = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
    labels, crowd = labels or [0] * len(boxes), crowd or [0] * len(boxes)
    return {"image_id": image_id, "boxes": boxes, "labels": labels, "area": area, "iscrowd": crowd}


def figures_of(id2label, *pairs):
    metric = CocoBoxMetric(id2label)
    metric.add_batch(predictions=[p for p, _ in pairs], references=[r for _, r in pairs])
    return metric.compute()


# --- the metric


def test_precision_is_that_of_a_calculation_by_hand():
    truth = [[0, 0, 100, 100], [200, 0, 300, 100]]
    found = [[0, 0, 100, 100], [400, 400, 500, 500], [200, 0, 300, 62]]  # right, wrong, right up to IoU 0.62
    figures = figures_of({0: "cat"}, (prediction(1, found, [0.9, 0.8, 0.7]), reference(1, truth)))
    loose = (51 * 1 + 50 * 2 / 3) / 101  # recall 0 to 0.5 at precision 1, up to 1 at 2/3
    strict = 51 / 101
    assert figures["map_50"] == pytest.approx(loose)
    assert figures["map_75"] == pytest.approx(strict)
    assert figures["map"] == figures["map_cat"] == pytest.approx((3 * loose + 7 * strict) / 10)
    assert figures["mar_1"] == pytest.approx(0.5)
    assert figures["mar_10"] == figures["mar_100"] == pytest.approx((3 * 1 + 7 * 0.5) / 10)
    assert figures["map_large"] == figures["map"] and figures["map_small"] == figures["map_medium"] == -1


def test_curves_are_those_of_a_calculation_by_hand():
    truth = [[0, 0, 100, 100], [200, 0, 300, 100]]
    found = [[0, 0, 100, 100], [400, 400, 500, 500], [200, 0, 300, 62]]  # right, wrong, right up to IoU 0.62
    metric = CocoBoxMetric({0: "cat", 1: "dog"})
    assert metric.precision == {}
    metric.add(prediction=prediction(1, found, [0.9, 0.8, 0.7]), reference=reference(1, truth))
    metric.compute()
    assert metric.precision == {  # without the dog, which is nowhere
        "50": {"cat": pytest.approx([1.0] * 51 + [2 / 3] * 50)},
        "75": {"cat": pytest.approx([1.0] * 51 + [0.0] * 50)},
    }
    assert json.loads(json.dumps(metric.precision)) == metric.precision


def test_curves_of_classes_with_one_name_are_told_apart_by_number():
    metric = CocoBoxMetric({3: "small", 5: "N/A", 6: "N/A"})
    boxes = [[0, 0, 50, 50]] * 3
    metric.add(prediction=prediction(1, boxes, [0.9] * 3, [3, 5, 6]), reference=reference(1, boxes, [3, 5, 6]))
    metric.compute()
    assert list(metric.precision["50"]) == ["small", "N/A_5", "N/A_6"]


def naive_precision(pairs, label, threshold):
    """Average precision of one class at one IoU, without areas and crowds, from the definition."""
    hits, positives = [], 0
    for answer, truth in pairs:
        boxes = [box for box, c in zip(truth["boxes"], truth["labels"], strict=True) if c == label]
        free = set(range(len(boxes)))
        positives += len(boxes)
        answers = [
            (score, box)
            for score, box, c in zip(answer["scores"], answer["boxes"], answer["labels"], strict=True)
            if c == label
        ]
        for score, box in sorted(answers, key=lambda pair: -pair[0]):
            overlaps = [float(box_iou(torch.tensor([box]), torch.tensor([boxes[i]]))) for i in sorted(free)]
            best = max(overlaps, default=0.0)
            if best >= threshold:
                free.remove(sorted(free)[overlaps.index(best)])
            hits.append((score, best >= threshold))
    curve, right = [], 0
    for count, (_, hit) in enumerate(sorted(hits, key=lambda pair: -pair[0]), start=1):
        right += hit
        curve.append((right / positives, right / count))
    levels = [level / 100 for level in range(101)]
    return sum(max((p for r, p in curve if r >= level - 1e-12), default=0.0) for level in levels) / 101


@pytest.mark.parametrize("num_classes, num_images, seed", [(1, 3, 0), (2, 6, 1), (3, 9, 2)])
def test_precision_is_that_of_a_naive_loop(num_classes, num_images, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for image_id in range(num_images):
        boxes = box_convert(torch.rand(5, 4, generator=generator).add(0.2).mul(100).double(), "cxcywh", "xyxy")
        labels = torch.arange(5) % num_classes
        moved = boxes.repeat(3, 1) + torch.randn(15, 4, generator=generator) * 8
        moved[:, 2:] = moved[:, 2:].maximum(moved[:, :2] + 1)
        scores = torch.rand(15, generator=generator)
        pairs.append(
            (
                prediction(image_id, moved.tolist(), scores.tolist(), labels.repeat(3).tolist()),
                reference(image_id, boxes.tolist(), labels.tolist()),
            )
        )
    metric = CocoBoxMetric({i: f"class {i}" for i in range(num_classes)})
    metric.add_batch(predictions=[p for p, _ in pairs], references=[r for _, r in pairs])
    figures = metric.compute()
    thresholds = [0.5 + 0.05 * i for i in range(10)]
    expected = [[naive_precision(pairs, label, t) for t in thresholds] for label in range(num_classes)]
    assert 0.05 < figures["map"] < 0.95
    assert figures["map"] == pytest.approx(sum(map(sum, expected)) / 10 / num_classes, abs=1e-6)
    assert figures["map_50"] == pytest.approx(sum(row[0] for row in expected) / num_classes, abs=1e-6)
    for label in range(num_classes):
        assert figures[f"map_class {label}"] == pytest.approx(sum(expected[label]) / 10, abs=1e-6)
        for percent, place in (("50", 0), ("75", 5)):
            curve = metric.precision[percent][f"class {label}"]
            assert len(curve) == 101 and curve == sorted(curve, reverse=True)
            assert sum(curve) / 101 == pytest.approx(expected[label][place], abs=1e-6)


def test_detections_in_a_crowd_are_not_wrong():
    truth = [[0, 0, 50, 50], [100, 100, 300, 300]]
    found = prediction(1, [[110, 110, 150, 150], [0, 0, 50, 50]], [0.9, 0.8])
    assert figures_of({0: "cat"}, (found, reference(1, truth, crowd=[0, 1])))["map"] == pytest.approx(1.0)
    assert figures_of({0: "cat"}, (found, reference(1, truth, crowd=[0, 0])))["map"] < 0.5


def test_an_image_counts_once_however_often_it_was_added():
    good = prediction(1, [[0, 0, 50, 50]], [0.9]), reference(1, [[0, 0, 50, 50]])
    bad = prediction(2, [[300, 300, 350, 350]], [0.95]), reference(2, [[0, 0, 50, 50]])
    once = figures_of({0: "cat"}, good, bad)
    assert once["map"] == pytest.approx(51 / 101 / 2)
    assert figures_of({0: "cat"}, good, good, bad, good, good) == once


def test_what_has_no_truth_is_minus_one_and_enters_no_mean():
    empty = prediction(1, [[0, 0, 50, 50]], [0.9]), reference(1, [])
    assert set(figures_of({0: "cat", 1: "dog"}, empty).values()) == {-1.0}
    cats = prediction(2, [[0, 0, 50, 50]], [0.9]), reference(2, [[0, 0, 50, 50]])
    figures = figures_of({0: "cat", 1: "dog"}, cats)
    assert figures["map"] == figures["map_cat"] == pytest.approx(1.0) and figures["map_dog"] == -1


def test_classes_named_as_a_figure_or_as_each_other_keep_their_own():
    pair = prediction(1, [[0, 0, 50, 50]], [0.9], [3]), reference(1, [[0, 0, 50, 50]], [3])
    figures = figures_of({3: "small", 5: "N/A", 6: "N/A", 7: "cat"}, pair)
    assert figures["map_small"] == -1 and figures["map_small_3"] == pytest.approx(1.0)
    assert list(figures) == [*FIGURES, "map_small_3", "map_N/A_5", "map_N/A_6", "map_cat"]


def test_metric_works_without_network_and_in_silence(monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise AssertionError("the metric asked for a network connection")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    figures_of({0: "cat"}, (prediction(1, [[0, 0, 50, 50]], [0.9]), reference(1, [[0, 0, 50, 50]])))
    assert capfd.readouterr() == ("", "")


def test_metrics_do_not_meet_and_leave_nothing_behind():
    good = prediction(1, [[0, 0, 50, 50]], [0.9]), reference(1, [[0, 0, 50, 50]])
    bad = prediction(1, [[90, 90, 99, 99]], [0.9]), reference(1, [[0, 0, 50, 50]])
    metrics = [CocoBoxMetric({0: "cat"}), CocoBoxMetric({0: "cat"})]
    for metric, (found, truth) in zip(metrics, (good, bad), strict=True):
        metric.add(prediction=found, reference=truth)
    assert [metric.compute()["map"] for metric in metrics] == [pytest.approx(1.0), pytest.approx(0.0)]
    assert not [path for metric in metrics for path in Path(metric.data_dir).glob("*.arrow")]
    metrics[0].close()
    assert [Path(metric.data_dir).exists() for metric in metrics] == [False, True]


def test_memory_does_not_grow_with_the_images():
    metric = CocoBoxMetric({0: "cat"})
    found = {"boxes": torch.rand(100, 4).numpy(), "scores": torch.rand(100).numpy(), "labels": [0] * 100}

    def add(image_ids):
        for i in image_ids:
            metric.add_batch(predictions=[{"image_id": i, **found}], references=[reference(i, [[0, 0, 9, 9]])])

    add(range(20))
    tracemalloc.start()
    add(range(20, 170))
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(metric) == 170
    assert grown < 150 * 100 * 48 / 3  # bytes: a detection has 48


@pytest.mark.parametrize(
    "found, truth, message",
    [
        (prediction(1, [[0, 0, 5, 5]], [0.9], [7]), reference(1, []), r"labels must be among the 1 .* got \[7\]"),
        (prediction(1, [], []), reference(2, []), "of one image, got 1, 2"),
        (prediction(1, [], []), reference(1, [[50, 60, 10, 10]]), r"must be \(x_min, y_min, x_max, y_max\)"),
    ],
)
def test_metric_refuses(found, truth, message):
    with pytest.raises(ValueError, match=message):
        figures_of({0: "cat"}, (found, truth))


# --- from models and labels to the metric


def random_answers(num_queries, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, num_queries, columns, generator=generator)
    boxes = torch.rand(3, num_queries, 4, generator=generator)
    return logits, boxes, torch.tensor([[480, 640], [33, 7], [1000, 999]])


@pytest.mark.parametrize("num_queries, num_classes", [(300, 80), (100, 3), (30, 5)])
def test_sigmoid_detections_are_those_of_the_processors(num_queries, num_classes):
    logits, boxes, sizes = random_answers(num_queries, num_classes, seed=num_queries)
    ours = detections_from_predictions(Predictions(logits, boxes), sizes)
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    for processor in (DeformableDetrImageProcessor(), RTDetrImageProcessor()):
        theirs = processor.post_process_object_detection(outputs, threshold=0, target_sizes=sizes)
        for image, expected in zip(ours, theirs, strict=True):
            count = min(100, len(expected["scores"]))  # RT-DETR's keeps no more than it has queries
            assert all(torch.equal(image[key][:count], expected[key][:count]) for key in expected)


@pytest.mark.parametrize("num_queries", [300, 100, 30])
def test_softmax_detections_are_the_best_of_the_processor(num_queries):
    logits, boxes, sizes = random_answers(num_queries, 6, seed=num_queries)
    ours = detections_from_predictions(Predictions(logits, boxes, activation="softmax"), sizes)
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
        detections = detections_from_predictions(answers, torch.stack([x["orig_size"] for x in labels]))
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


# --- files


@needs_coco_eval
def test_the_official_figures():
    figures = evaluate_coco_files(ANNOTATIONS, DETECTIONS)
    assert [figures[name] for name in FIGURES] == pytest.approx(OFFICIAL, abs=1e-6)
    assert figures["map_person"] > 0


def coco(**changes):
    return {
        "images": [{"id": 1}, {"id": 2}],
        "annotations": [{"image_id": 1, "category_id": 3, "bbox": [0, 0, 50, 50]}],
        "categories": [{"id": 3, "name": "cat"}],
        **changes,
    }


def detection(**changes):
    return {"image_id": 1, "category_id": 3, "bbox": [0, 0, 50, 50], "score": 0.5, **changes}


@pytest.fixture
def files(tmp_path):
    def write(truth, answers):
        paths = tmp_path / "truth.json", tmp_path / "answers.json"
        for path, content in zip(paths, (truth, answers), strict=True):
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return paths

    return write


def test_files_need_neither_area_nor_crowd(files):
    assert evaluate_coco_files(*files(coco(), [detection()]))["map_cat"] == pytest.approx(1.0)
    assert evaluate_coco_files(*files(coco(), []))["map"] == 0


FAR = [{"image_id": 1, "category_id": 9, "bbox": [0, 0, 5, 5]}]


@pytest.mark.parametrize(
    "truth, answers, message",
    [
        ("{", [], r"truth.json must be a JSON file, got: Expecting"),
        (coco(), "\x00", r"answers.json must be a JSON file"),
        ([], [], r"truth.json must be a COCO object with the lists images, annotations, categories, got a list"),
        ({"images": [], "info": {}}, [], r"got an object with \['images', 'info'\]"),
        (coco(images=[{"file_name": "a.jpg"}]), [], r"truth.json must hold images with `id`, got {'file_name'"),
        (coco(categories=[{"id": 3}]), [], r"categories with `id` and `name`, got {'id': 3}"),
        (coco(annotations=FAR), [], r"truth.json must hold category ids of the ground truth, got 9"),
        (coco(), {"a": 1}, r"answers.json must be a list of COCO detections, got a dict"),
        (coco(), [detection(bbox=[1, 2, 3])], r"answers.json must hold boxes with .*'bbox': \[1, 2, 3\]"),
        (coco(), [detection(bbox=[1, 2, -3, 4])], r"`bbox` as \[x, y, width, height\] in pixels, got"),
        (coco(), [detection(bbox=[0, 0, float("nan"), 1])], r"`bbox` as \[x, y, width, height\] in pixels, got"),
        (coco(), [{"image_id": 1, "category_id": 3, "segmentation": []}], r"answers.json must hold boxes with"),
        (coco(), [detection(score=None)], r"answers.json must hold detections with a finite `score`, got"),
        (coco(), [detection(image_id=i) for i in range(50)], r"image ids .*, got 0, 3, 4, 5, 6, 7, 8, 9, 10, 11$"),
        (coco(), [detection(category_id=0)], r"answers.json must hold category ids of the ground truth, got 0"),
    ],
)
def test_bad_files_are_named_with_what_is_wrong(files, truth, answers, message):
    with pytest.raises(ValueError, match=message):
        evaluate_coco_files(*files(truth, answers))


# --- through `Trainer`


class FileTrainer(Trainer):
    """Answers with the detections of a results file, through the gathering of a real training evaluation."""

    def __init__(self, num_images, batch_size, output_dir, annotations, detections, **arguments):
        id2label, self.found, self.truth = read_coco_files(annotations, detections)
        self.evaluator, self.seen = CocoEvaluator(id2label), []
        arguments = TrainingArguments(
            output_dir,
            per_device_eval_batch_size=batch_size,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            **arguments,
        )
        super().__init__(
            torch.nn.Linear(1, 1),
            arguments,
            data_collator=lambda indices: {"indices": torch.tensor(indices)},
            eval_dataset=list(range(num_images)),
            compute_metrics=self.compute_figures,
        )

    def compute_figures(self, evaluation, compute_result=True):
        self.seen += evaluation.label_ids["image_id"].tolist()
        return self.evaluator(evaluation, compute_result)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        pick = inputs["indices"].tolist()
        kinds = defaultdict(lambda: torch.float64, image_id=torch.int64, labels=torch.int64, iscrowd=torch.int64)

        def tensors(image):
            tensors = {name: torch.tensor(value, dtype=kinds[name]) for name, value in image.items()}
            return {**tensors, "boxes": tensors["boxes"].reshape(-1, 4)}

        return torch.zeros(()), *gatherable(
            [tensors(self.found[i]) for i in pick], [tensors(self.truth[i]) for i in pick]
        )


def seven_images(folder):
    """Files of seven images with 0 to 6 boxes, found more or less, and some that are not there."""
    generator = torch.Generator().manual_seed(0)
    annotations, answers = [], []
    for image_id in range(7):
        for box in torch.rand(image_id, 4, generator=generator).add(0.2).mul(50).tolist():
            annotations.append({"image_id": image_id, "category_id": len(annotations) % 2, "bbox": box, "iscrowd": 0})
            moved = [value + float(torch.randn((), generator=generator)) * 3 for value in box[:2]]
            answers.append({**annotations[-1], "bbox": [*moved, *box[2:]]})
        answers.append({"image_id": image_id, "category_id": 1, "bbox": [70, 70, 9, 9]})
    for answer in answers:
        answer["score"] = float(torch.rand((), generator=generator))
    truth = {
        "images": [{"id": i} for i in range(7)],
        "annotations": annotations,
        "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
    }
    paths = folder / "truth.json", folder / "answers.json"
    for path, content in zip(paths, (truth, answers), strict=True):
        path.write_text(json.dumps(content))
    return paths


def evaluate_twice(files, num_images, batch_size, folder, **arguments):
    trainer = FileTrainer(num_images, batch_size, folder, *files, **arguments)
    runs = []
    for _ in range(2):
        trainer.seen.clear()
        figures = trainer.evaluate()
        runs.append({"seen": sorted(trainer.seen), "figures": [figures[f"eval_{name}"] for name in FIGURES]})
    return runs


@pytest.mark.parametrize("streaming", [True, False])
def test_trainer_gives_the_figures_of_the_files(tmp_path, streaming):
    files = seven_images(tmp_path)
    expected = evaluate_coco_files(*files)
    assert 0.1 < expected["map"] < 0.9
    for run in evaluate_twice(files, 7, 2, tmp_path, batch_eval_metrics=streaming):
        assert len(run["seen"]) == len(set(run["seen"])) == 7
        assert run["figures"] == pytest.approx([expected[name] for name in FIGURES], abs=1e-9)


@pytest.mark.distributed
def test_two_processes_give_the_figures_of_one_in_each(tmp_path):
    expected = evaluate_coco_files(*seven_images(tmp_path))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, tmp_path]
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        runs = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for run in runs["uneven"]:
            assert len(run["seen"]) == len(set(run["seen"])) == 7
            assert run["figures"] == pytest.approx([expected[name] for name in FIGURES], abs=1e-9)
        for run in runs.get("halves", []):  # where the real data is there
            assert len(run["seen"]) == len(set(run["seen"])) == 100
            assert run["figures"] == pytest.approx(OFFICIAL, abs=1e-6)


def work(folder):
    """One of the two processes."""
    settings = {"batch_eval_metrics": True, "ddp_backend": "gloo"}
    uneven = folder / "truth.json", folder / "answers.json"
    runs = {"uneven": evaluate_twice(uneven, 7, 2, folder, **settings)}
    if ANNOTATIONS.is_file():
        runs["halves"] = evaluate_twice((ANNOTATIONS, DETECTIONS), 100, 10, folder, **settings)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(runs))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
