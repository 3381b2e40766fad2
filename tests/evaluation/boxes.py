"""Detections and ground truth as the metric reads them, and the official data with its official figures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_detrkd.evaluation import CocoBoxMetric
from tests import ROOT


COCO_EVAL = Path(os.environ.get("HF_DETRKD_DATA", ROOT.parent / "shared" / "data")) / "coco_eval"
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
