"""Predictions of a teacher for images with different preprocessing, together with the ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.ops import box_iou, nms

from ...data import DetectionCollator, DetectionDataset, DetectionTransform
from ...data.processor import NO_NORMALIZATION, Normalization
from ...distillation.prediction import detections_and_truth
from ...distillation.teacher import Teacher
from ...evaluation import CocoBoxMetric, class_figures


Columns = Sequence[int | None]
"""The teacher's class for each class of the data set, as in [`ClassMap`]."""

IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES: Normalization = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BYTES: Normalization = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
NORMALIZATIONS = {
    "no normalisation": NO_NORMALIZATION,
    "ImageNet's mean and standard deviation": IMAGENET,
    "mean and standard deviation 0.5": HALVES,
    "pixels of 0 to 255 (do_rescale false)": BYTES,
}


@dataclass(frozen=True)
class View:
    """Preprocessing of images: a size as in [`DetectionTransform`], and the normalisation of pixels."""

    size: tuple[int, int] | Mapping[str, int]
    normalization: Normalization


@dataclass(frozen=True)
class Seen:
    """Ground truth and teacher predictions (best first) of one image; boxes are corners in pixels.

    Attributes:
        image_id (`int`)
        size (`tuple[int, int]`): height and width of the original image.
        truth (`numpy.ndarray` of shape `(num_boxes, 4)`): without crowd regions.
        labels (`numpy.ndarray` of shape `(num_boxes,)`): the data set's classes.
        boxes (`numpy.ndarray` of shape `(num_detections, 4)`)
        named (`numpy.ndarray` of shape `(num_detections,)`): the teacher's own classes.
        scores (`numpy.ndarray` of shape `(num_detections,)`)
    """

    image_id: int
    size: tuple[int, int]
    truth: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    named: np.ndarray
    scores: np.ndarray

    def best(self) -> np.ndarray:
        """As many boxes as there are objects: the best of all classes, without duplicates, `(num_boxes, 4)`."""
        kept = nms(torch.from_numpy(self.boxes).float(), torch.from_numpy(self.scores).float(), 0.7)
        return self.boxes[kept[: len(self.truth)].numpy()]


def look(teacher: Teacher, dataset: DetectionDataset, view: View, batch_size: int) -> list[Seen]:
    """Predictions of a teacher for the images of a data set in a view.

    Args:
        teacher ([`Teacher`]): with its own classes, and without a normalisation of its own.
        dataset ([`DetectionDataset`])
        view ([`View`])
        batch_size (`int`): images per batch.
    """
    shown = dataset.with_transform(DetectionTransform(view.size, *view.normalization))
    found: list[Seen] = []
    for batch in DataLoader(shown, batch_size, collate_fn=DetectionCollator()):
        sizes = [tuple(label["orig_size"].tolist()) for label in batch["labels"]]
        device = teacher.model.device
        tensors = {name: v.to(device) for name, v in batch.items() if name != "labels"}
        if "pixel_mask" in tensors and tensors["pixel_mask"].all():  # families without masks take unpadded batches
            del batch["pixel_mask"], tensors["pixel_mask"]
        for (answer, truth), size in zip(detections_and_truth(teacher, batch | tensors), sizes, strict=True):
            single = truth["iscrowd"] == 0
            objects = truth["boxes"][single], truth["labels"][single]
            found.append(Seen(truth["image_id"], size, *objects, answer["boxes"], answer["labels"], answer["scores"]))
    return found


def map_of(seen: Sequence[Seen], columns: Columns, classes: Sequence[str]) -> float:
    """mAP over the classes that the teacher knows and the images contain; NaN if there are none."""
    numbers = {column: number for number, column in enumerate(columns) if column is not None}
    answers: list[dict[str, Any]] = []
    references: list[dict[str, Any]] = []
    for image in seen:
        known = [i for i, name in enumerate(image.named.tolist()) if name in numbers]
        labels = [numbers[name] for name in image.named[known].tolist()]
        area = (image.truth[:, 2:] - image.truth[:, :2]).prod(1)
        truth = {"boxes": image.truth, "labels": image.labels, "area": area, "iscrowd": np.zeros(len(area), int)}
        answer = {"boxes": image.boxes[known], "labels": labels, "scores": image.scores[known]}
        answers.append(answer | {"image_id": image.image_id})
        references.append(truth | {"image_id": image.image_id})
    metric = CocoBoxMetric(dict(enumerate(classes)))
    metric.add_batch(predictions=answers, references=references)
    figures = metric.compute()
    names = class_figures(dict(enumerate(classes)))
    values = [figures[names[number]] for number in numbers.values() if figures[names[number]] >= 0]
    return float(np.mean(values)) if values else float("nan")


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU `(num_boxes, num_others)` of corners."""
    return box_iou(torch.from_numpy(boxes).double(), torch.from_numpy(others).double()).numpy()
