"""Faster R-CNN as users of transformers and COCO see it, against torchvision's own detections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_area
from transformers import DetrImageProcessor, pipeline

from hf_detrkd.evaluation import CocoBoxMetric, detections_from_predictions, predictions_from_heads
from tests import tiny
from tests.models.faster_rcnn import SIZES, build, corners, inputs_of, photographs, twin_of


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6])
@torch.no_grad()
def test_the_image_processor_finds_the_detector_s_own_boxes_and_no_others(threshold):
    model, images = build(), photographs()
    original = [(2 * height, 3 * width) for height, width in SIZES]
    found = DetrImageProcessor().post_process_object_detection(model(**inputs_of(images)), threshold, original)
    for image, own in zip(found, twin_of(model)(images), strict=True):
        above = own["scores"] > threshold
        assert above.any() and (threshold < 0.3 or not above.all())
        assert torch.equal(image["labels"], own["labels"][above] - 1)
        torch.testing.assert_close(image["scores"], own["scores"][above], atol=1e-5, rtol=0)
        torch.testing.assert_close(image["boxes"], own["boxes"][above] * torch.tensor([3, 2, 3, 2]), atol=1e-3, rtol=0)


@torch.no_grad()
def test_the_pipeline_finds_the_detector_s_own_boxes_and_no_others():
    model = build()
    processor = DetrImageProcessor(size={"height": 64, "width": 96}, do_pad=False)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    found = pipeline("object-detection", model=model, image_processor=processor)(picture, threshold=0.4)
    (own,) = twin_of(model)([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255])
    above = own["scores"] > 0.4
    assert 2 < above.sum() < len(above) and len(found) == above.sum()
    for one, box, label, score in zip(found, *(own[key][above] for key in ("boxes", "labels", "scores")), strict=True):
        assert one["label"] == tiny.LABELS[label - 1]
        assert one["score"] == pytest.approx(score.item(), abs=1e-4)
        place = torch.tensor([one["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")])
        assert (place - box).abs().max() <= 1  # which the pipeline rounds down


def truth_near(detections: Sequence[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Ground truth of each image: some detections moved a little, some of another class, some anywhere."""
    generator, truth = torch.Generator().manual_seed(0), []
    for number, own in enumerate(detections):
        boxes, labels = own["boxes"][:30:2].clone(), own["labels"][:30:2] - 1
        boxes += 0.5 * torch.randn(boxes.shape, generator=generator)
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 2)
        labels[::5] = (labels[::5] + 1) % tiny.NUM_CLASSES
        anywhere = corners(tiny.random_boxes(3, generator=generator), (64, 64))
        boxes, labels = torch.cat([boxes, anywhere]), torch.cat([labels, torch.arange(3)])
        row = {"image_id": number, "boxes": boxes, "labels": labels, "area": box_area(boxes)}
        truth.append({key: value.tolist() if isinstance(value, Tensor) else value for key, value in row.items()})
        truth[-1]["iscrowd"] = [0] * len(boxes)
    return truth


@pytest.mark.parametrize("threshold", [0.0, 0.4])
@torch.no_grad()
def test_average_precision_is_that_of_torchvision_s_own_detections(threshold):
    images = [image for seed in range(2) for image in photographs(seed=seed)]
    sizes = [image.shape[1:] for image in images]
    model = build(box_score_thresh=threshold)
    detections = twin_of(model, box_score_thresh=threshold)(images)
    output = model(**inputs_of(images))
    assert threshold == 0.0 or any(len(own["scores"]) < 100 for own in detections)
    predictions = predictions_from_heads(output.logits, output.pred_boxes, model.config.num_labels)
    raw = [{**own, "labels": own["labels"] - 1} for own in detections]
    figures = []
    for answers in (raw, detections_from_predictions(predictions, torch.tensor(sizes))):
        metric = CocoBoxMetric(model.config.id2label)
        rows = [
            {"image_id": number, **{key: own[key].tolist() for key in ("boxes", "labels", "scores")}}
            for number, own in enumerate(answers)
        ]
        metric.add_batch(predictions=rows, references=truth_near(detections))
        figures.append(metric.compute())
    assert figures[1] == pytest.approx(figures[0], abs=1e-6)
    assert 0.05 < figures[0]["map"] < 0.95
