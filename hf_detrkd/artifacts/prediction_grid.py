"""Draws the predictions of several detectors next to the ground truth, with the student's worst failures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from ..data import DetectionDataset
from ..evaluation import references_from_labels
from .draw_boxes import class_colors, comparison_grid, draw_detections
from .run_folder import SEEN


SHOWN = 3  # images from the beginning of the set, and as many failures
Detections = dict[str, Tensor]
Predict = Callable[[Sequence[int]], list[Detections]]
"""Positions in the evaluation set to the detections in these images."""


def draw_predictions(
    predictors: Mapping[str, Predict], eval_set: DetectionDataset, file: Path, seen: int = SEEN
) -> None:
    """Draws the ground truth next to every model's detections: the first images, then those with the most errors of
    the last model.

    Args:
        predictors (`dict[str, Callable]`): functions from positions of images to detections (`boxes` as x_min, y_min,
            x_max, y_max in pixels, `labels`, `scores`), by model name, the student last.
        eval_set ([`DetectionDataset`])
        file (`Path`): the image file to write.
        seen (`int`): number of images that are searched for failures.
    """
    places = list(range(min(seen, len(eval_set))))
    student = list(predictors)[-1]
    truth = references_from_labels([eval_set[place]["labels"] for place in places])
    errors = [count_errors(*pair) for pair in zip(predictors[student](places), truth, strict=True)]
    worst = sorted(places[SHOWN:], key=lambda place: -errors[place])[:SHOWN]
    shown = [*places[:SHOWN], *worst]
    columns = {name.capitalize(): predict(shown) for name, predict in predictors.items()}
    names, colors = eval_set.classes, class_colors(eval_set.classes)
    rows = []
    for row, place in enumerate(shown):
        image = eval_set.records[place].load()
        labels = [names[label] for label in truth[place]["labels"]]
        pictures = [draw_detections(image, truth[place]["boxes"], labels, color=colors)]
        pictures += [_picture(image, found[row], names, colors) for found in columns.values()]
        rows.append(pictures)
    comparison_grid(rows, ["Ground truth", *columns]).save(file)


def count_errors(found: Detections, truth: Detections) -> int:
    """Missed objects plus false detections, at IoU 0.5 and with the same class."""
    if not len(found["boxes"]) or not len(truth["boxes"]):
        return len(found["boxes"]) + len(truth["boxes"])
    same = found["labels"][:, None] == truth["labels"]
    hit = (box_iou(found["boxes"].float(), truth["boxes"].float()) >= 0.5) & same
    return int((~hit.any(0)).sum() + (~hit.any(1)).sum())


def _picture(image: Image.Image, found: Detections, names: list[str], colors: Mapping[str, Any]) -> Image.Image:
    labels = [names[label] for label in found["labels"].tolist()]
    return draw_detections(image, found["boxes"], labels, found["scores"], colors)
