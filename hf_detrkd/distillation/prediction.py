"""Teacher evaluation on a data set, and detections of teacher or student for single images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters import adapter_for, max_detections_of
from ..data import DetectionCollator, DetectionDataset
from ..data.pixels import normalized
from ..evaluation import detections_from_predictions, references_from_labels
from ..evaluation.efficiency import evaluating
from ..losses.functional import UNKNOWN
from ..structures.outputs import Predictions
from .teacher import Teacher, teacher_view


CONFIDENT = 0.4  # score threshold of detections that are drawn and counted
Detections = dict[str, Tensor]


def evaluate_teacher(
    teacher: Teacher,
    batches: Iterable[Mapping[str, Any]],
    id2label: Mapping[int, str],
    max_detections: int | None = None,
) -> tuple[dict[str, float], dict[str, Any] | None]:
    """COCO metrics of a teacher over the batches of all processes, with the images that it gets during distillation.

    It does not use `Trainer`'s evaluation loop, which would mark the student as prepared: it would train without DDP.

    Args:
        teacher ([`Teacher`])
        batches (`Iterable[dict]`): batches of this process, on the teacher's device.
        id2label (`dict[int, str]`): the student's classes.
        max_detections (`int`, *optional*): per image. Default: [`DetectorSpec.max_detections`] of the teacher.

    Returns:
        The metrics of [`CocoBoxMetric`] with the prefix `teacher_`, equal on all processes; and precision over recall,
        on the first process only.
    """
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for batch in batches:
        pairs += detections_and_truth(teacher, batch, max_detections)
    everyone = gather_object(pairs)
    figures: list[Any] = [None]
    curves = None
    if PartialState().is_main_process:
        from ..evaluation import CocoBoxMetric  # loads evaluate and the COCO library

        metric = CocoBoxMetric(dict(id2label))
        metric.add_batch(predictions=[found for found, _ in everyone], references=[truth for _, truth in everyone])
        figures, curves = [metric.compute()], metric.precision
    broadcast_object_list(figures)
    return {f"teacher_{name}": value for name, value in figures[0].items()}, curves


def detections_and_truth(
    teacher: Teacher, batch: Mapping[str, Any], max_detections: int | None = None
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Detections and ground truth of each image of a batch, on the host."""
    answers = teacher.of(batch).found
    # NaN predictions count as no detections, so that such a teacher fails its check.
    boxes = answers.boxes.nan_to_num(0.5, 0.5, 0.5)
    answers = Predictions(answers.logits.nan_to_num(UNKNOWN), boxes, None, answers.activation)
    sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
    found = detections_from_predictions(answers, sizes, max_detections or teacher.spec.max_detections)
    truth = references_from_labels(batch["labels"])
    images = [int(label["image_id"]) for label in batch["labels"]]
    return [
        (_on_host(one) | {"image_id": image}, _on_host(other) | {"image_id": image})
        for one, other, image in zip(found, truth, images, strict=True)
    ]


def _on_host(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v.cpu().numpy() if isinstance(v, torch.Tensor) else v for name, v in tensors.items()}


def predictor(
    model: PreTrainedModel | Teacher, dataset: DetectionDataset, batch_size: int = 8
) -> Callable[[Sequence[int]], list[Detections]]:
    """Returns a function that predicts the confident detections for image indices of a data set.

    Args:
        model: a student, or a teacher (which gets `teacher_pixel_values` if present).
        dataset ([`DetectionDataset`])
        batch_size (`int`): images per forward pass.

    Returns:
        `Callable`: returns `boxes` (x_min, y_min, x_max, y_max in pixels of the original image), `labels` and `scores`
        of each image, on the CPU.
    """

    limit = max_detections_of((model.model if isinstance(model, Teacher) else model).config)

    def predict(places: Sequence[int]) -> list[Detections]:
        found: list[Detections] = []
        for start in range(0, len(places), batch_size):
            items = [dataset[place] for place in places[start : start + batch_size]]
            batch = normalized(DetectionCollator()(items))
            sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
            for image in detections_from_predictions(_answers_of(model, batch), sizes, limit):
                found.append({name: value[image["scores"] > CONFIDENT].cpu() for name, value in image.items()})
        return found

    return predict


def _answers_of(model: PreTrainedModel | Teacher, batch: Mapping[str, Any]) -> Predictions:
    """Predictions of a model for a batch on the CPU."""
    if isinstance(model, Teacher):
        pixels, mask = teacher_view(batch)
        device = model.model.device
        return model(pixels.to(device), None if mask is None else mask.to(device)).found
    mask = batch.get("pixel_mask")
    with evaluating(model), torch.no_grad():
        images = batch["pixel_values"].to(model.device, model.dtype)
        output, _ = adapter_for(model).encode(images, None if mask is None else mask.to(model.device))
    return output.found
