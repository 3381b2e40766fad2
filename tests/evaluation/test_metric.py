"""COCO figures against computations by hand and naive ones."""

from __future__ import annotations

import json
import socket
import tracemalloc
from pathlib import Path

import pytest
import torch
from torchvision.ops import box_convert, box_iou

from hf_detrkd.evaluation import FIGURES, CocoBoxMetric
from tests.evaluation.boxes import figures_of, prediction, reference


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


def test_a_metric_can_be_used_again_and_has_nothing_to_compute_without_images():
    metric = CocoBoxMetric({0: "cat"})
    good = prediction(1, [[0, 0, 50, 50]], [0.9]), reference(1, [[0, 0, 50, 50]])
    bad = prediction(1, [[90, 90, 99, 99]], [0.9]), reference(1, [[0, 0, 50, 50]])
    for (found, truth), wanted in ((good, 1.0), (bad, 0.0)):
        assert metric.compute(predictions=[found], references=[truth])["map"] == pytest.approx(wanted)
        assert len(metric) == 0
    with pytest.raises(ValueError, match="there are no images"):
        metric.compute()


def test_a_refused_batch_leaves_no_boxes():
    metric = CocoBoxMetric({0: "cat"})
    metric.add(prediction=prediction(1, [[0, 0, 50, 50]], [0.9]), reference=reference(1, [[0, 0, 50, 50]]))
    with pytest.raises(ValueError, match="labels must be among"):
        metric.add(prediction=prediction(2, [[0, 0, 5, 5]], [0.9], [3]), reference=reference(2, [[0, 0, 9, 9]]))
    assert metric.compute()["map"] == pytest.approx(1.0)


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
    assert not [path for metric in metrics for path in Path(metric.data_dir).iterdir()]
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
        (prediction(1, [], []), reference(2, []), r"of the same images, got \[1\] and \[2\]"),
        (prediction(1, [[0, 0, 5, 5]], [0.9, 0.8]), reference(1, []), r"scores must be .* 1 boxes, got shape \(2,\)"),
        (
            {"image_id": 1, "boxes": [], "labels": []},
            reference(1, []),
            "must have boxes, labels, scores, got image_id",
        ),
        (prediction(1, [], []), reference(1, [[50, 60, 10, 10]]), r"must be \(x_min, y_min, x_max, y_max\)"),
    ],
)
def test_metric_refuses(found, truth, message):
    with pytest.raises(ValueError, match=message):
        figures_of({0: "cat"}, (found, truth))


def test_images_whose_ids_no_double_tells_apart_are_different_images():
    here, there = [[0, 0, 100, 100]], [[200, 0, 300, 100]]
    ids = (2**60, 2**60 + 1)
    right = zip(ids, (here, there), (here, there), strict=True)
    swapped = zip(ids, (there, here), (here, there), strict=True)
    for pairs, wanted in ((right, 1.0), (swapped, 0.0)):
        images = [(prediction(i, found, [0.9]), reference(i, truth)) for i, found, truth in pairs]
        assert figures_of({0: "cat"}, *images)["map"] == pytest.approx(wanted)
