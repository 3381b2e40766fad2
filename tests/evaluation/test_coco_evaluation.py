"""The evaluation class by class against the COCO library on all boxes at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from hf_detrkd.evaluation import FIGURES, CocoBoxMetric
from tests.evaluation.boxes import figures_of, prediction, reference


LABELS = (1, 2, 5, 9)


def random_images(seed, num_images=12):
    """Images with equal scores, crowds, boxes of all sizes, more than 100 detections of a class, and a class that is
    nowhere."""
    generator = np.random.default_rng(seed)
    images = []
    for image_id in generator.permutation(num_images).tolist():
        boxes = generator.uniform(0, 300, (generator.integers(0, 9), 4))
        boxes[:, 2:] = boxes[:, :2] + generator.uniform(0, 200, (len(boxes), 2)) * generator.uniform(0.05, 1)
        found = boxes[generator.integers(0, len(boxes), 150)] if len(boxes) else generator.uniform(0, 99, (7, 4))
        found = found + generator.normal(0, 4, found.shape)
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
        scores = generator.integers(0, 20, len(found)) / 20
        labels = generator.choice(LABELS[: generator.integers(1, 4)], len(found))
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1) * generator.uniform(0.5, 1, len(boxes))
        truth = {"labels": generator.choice(LABELS[:3], len(boxes)), "area": area}
        truth |= {"image_id": image_id, "boxes": boxes, "iscrowd": generator.integers(0, 5, len(boxes)) // 4}
        images.append(({"image_id": image_id, "boxes": found, "scores": scores, "labels": labels}, truth))
    return images


def annotations(images, **columns):
    """COCO annotations with further columns, whose names in the images are given."""
    found = []
    for image in images:
        for i, (left, top, right, bottom) in enumerate(image["boxes"].tolist()):
            box = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
            ids = {"id": len(found) + 1, "image_id": image["image_id"], "category_id": int(image["labels"][i])}
            found.append(ids | box | {name: image[column][i].item() for name, column in columns.items()})
    return found


def library_figures(images):
    """Figures and precision of the COCO library, given all classes."""
    images = sorted(images, key=lambda pair: pair[0]["image_id"])
    truth = annotations([pair[1] for pair in images], area="area", iscrowd="iscrowd")
    answers = annotations([pair[0] for pair in images], score="scores")
    frame = {
        "images": [{"id": pair[0]["image_id"]} for pair in images],
        "categories": [{"id": number, "name": f"class {number}"} for number in LABELS],
    }
    evaluator = COCOeval_faster(*(COCO({**frame, "annotations": boxes}) for boxes in (truth, answers)), iouType="bbox")
    evaluator.run()
    return evaluator.stats.tolist(), evaluator.eval["precision"]


@pytest.mark.parametrize("seed", range(8))
def test_figures_are_exactly_those_of_all_classes_at_once(seed):
    images = random_images(seed)
    metric = CocoBoxMetric({number: f"class {number}" for number in LABELS})
    for found, truth in images:
        metric.add_batch(predictions=[found], references=[truth])
    figures = metric.compute()
    stats, precision = library_figures(images)
    assert [figures[name] for name in FIGURES] == stats
    assert 0 < figures["map"] < 1 and figures["map_class 9"] == -1
    for place, number in enumerate(LABELS):
        curve = precision[0, :, place, 0, -1].tolist()
        assert metric.precision["50"].get(f"class {number}", [-1.0] * 101) == curve


def test_lists_arrays_and_tensors_are_equal():
    names, pair = {1: "a", 2: "b", 5: "c"}, random_images(1)[0]
    wanted = figures_of(names, pair)
    assert wanted["map"] > 0
    for kind in (np.ndarray.tolist, torch.from_numpy):
        images = [{name: v if name == "image_id" else kind(v) for name, v in image.items()} for image in pair]
        assert figures_of(names, images) == wanted


def test_tensors_may_have_16_bits():
    boxes = torch.tensor([[0.0, 0, 8, 8]], dtype=torch.bfloat16)
    found, truth = prediction(1, boxes, torch.tensor([0.5], dtype=torch.bfloat16)), reference(1, [[0, 0, 8, 8]])
    assert figures_of({0: "cat"}, (found, truth))["map"] == pytest.approx(1.0)
