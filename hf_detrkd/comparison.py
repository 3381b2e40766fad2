"""Several detectors on the same images: the picture at the end of a run, failures included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou
from transformers import PreTrainedModel

from .adapters import class_names
from .data import DetectionCollator, DetectionDataset
from .efficiency import evaluating
from .evaluation import detections_from_predictions, references_from_labels
from .model_card import SEEN
from .teacher import Teacher
from .teacher_check import seen_by
from .visualization import class_colors, comparison_grid, draw_detections


SHOWN = 3  # images from the beginning of the set, and as many failures
SURE = 0.4  # least score of a box that is drawn, and that counts as an answer
Found = dict[str, Tensor]


def draw_predictions(
    models: Mapping[str, PreTrainedModel | Teacher], eval_set: DetectionDataset, file: Path, seen: int = SEEN
) -> None:
    """Draws the truth beside every model's answers: the first images, then those in which the last model errs most.

    Args:
        models (`dict[str, PreTrainedModel | Teacher]`): by their headings, the student last.
        eval_set ([`DetectionDataset`])
        file (`Path`): the picture.
        seen (`int`): images among which failures are looked for.
    """
    with evaluating(*(model.model if isinstance(model, Teacher) else model for model in models.values())):
        _picture_of(models, eval_set, seen).save(file)


def _picture_of(models: Mapping[str, PreTrainedModel | Teacher], eval_set: DetectionDataset, seen: int) -> Image.Image:
    places = list(range(min(seen, len(eval_set))))
    student = list(models)[-1]
    errors = [error_of(found, truth) for found, truth in answers(models[student], eval_set, places)]
    first = places[:SHOWN]
    worst = sorted(places[SHOWN:], key=lambda place: -errors[place])[:SHOWN]
    shown = [*first, *worst]
    columns = {name.capitalize(): answers(model, eval_set, shown) for name, model in models.items()}
    names, colors = eval_set.classes, class_colors(eval_set.classes)
    rows = []
    for row, place in enumerate(shown):
        image = eval_set.records[place].load()
        truth = next(iter(columns.values()))[row][1]
        labels = [names[label] for label in truth["labels"]]
        pictures = [draw_detections(image, truth["boxes"], labels, color=colors)]
        pictures += [picture(image, found[row][0], names, colors) for found in columns.values()]
        rows.append(pictures)
    return comparison_grid(rows, ["Truth", *columns])


def answers(
    model: PreTrainedModel | Teacher, eval_set: DetectionDataset, places: list[int], batch_size: int = 8
) -> list[tuple[Found, Found]]:
    """What a model finds in images of a set above the least score, and what is there, in pixels, on the CPU."""
    asked = model if isinstance(model, Teacher) else Teacher(model, class_names(model.config))
    device, pairs = asked.model.device, []
    for start in range(0, len(places), batch_size):
        batch: dict[str, Any] = DetectionCollator()([eval_set[place] for place in places[start : start + batch_size]])
        labels = batch.pop("labels")
        if asked is not model:  # a student sees its own view
            batch = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
        answer = seen_by(asked, {name: value.to(device) for name, value in batch.items()})
        found = detections_from_predictions(answer, torch.stack([label["orig_size"] for label in labels]))
        kept = [{name: value[image["scores"] > SURE].cpu() for name, value in image.items()} for image in found]
        pairs += list(zip(kept, references_from_labels(labels), strict=True))
    return pairs


def error_of(found: Found, truth: Found) -> int:
    """Objects that were missed, and answers that are none: at IoU 0.5 and of the same class."""
    if not len(found["boxes"]) or not len(truth["boxes"]):
        return len(found["boxes"]) + len(truth["boxes"])
    same = found["labels"][:, None] == truth["labels"]
    hit = (box_iou(found["boxes"].float(), truth["boxes"].float()) >= 0.5) & same
    return int((~hit.any(0)).sum() + (~hit.any(1)).sum())


def picture(image: Image.Image, found: Found, names: list[str], colors: Mapping[str, Any]) -> Image.Image:
    labels = [names[label] for label in found["labels"].tolist()]
    return draw_detections(image, found["boxes"], labels, found["scores"], colors)
