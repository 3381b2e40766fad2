"""The teacher on the evaluation set, before it teaches: its figures, and whether it can detect at all."""

from __future__ import annotations

from collections.abc import Sized
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers.utils import logging

from .adapters import class_names
from .evaluation import CocoBoxMetric, class_figures, detections_from_predictions, references_from_labels
from .guards import refuse_weak_teacher
from .losses import UNKNOWN
from .outputs import Predictions
from .teacher import Teacher


if TYPE_CHECKING:
    from .trainer import DistillationTrainer


logger = logging.get_logger(__name__)


def evaluate_teacher(trainer: DistillationTrainer, dataset: Any) -> dict[str, float]:
    """COCO figures of the run's teacher on a data set, seeing exactly what it will teach from.

    A loop of its own: `Trainer`'s would take the student for prepared, and then train it without DDP.

    Returns:
        `dict[str, float]`: as [`CocoBoxMetric`] names them, with `teacher_` in front; equal on all processes.
    """
    teacher, args = trainer.distiller.teacher, trainer.args
    assert teacher is not None
    mine = Subset(dataset, range(args.process_index, len(dataset), args.world_size))
    loader = DataLoader(
        mine, args.eval_batch_size, collate_fn=trainer.data_collator, num_workers=args.dataloader_num_workers
    )
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    hidden = args.disable_tqdm or not trainer.is_world_process_zero()
    for batch in tqdm(loader, desc="Evaluating the teacher", disable=hidden):
        pairs += detections_of(teacher, trainer._prepare_inputs(batch))
    everyone = gather_object(pairs)
    figures: list[Any] = [None]
    if trainer.is_world_process_zero():
        metric = CocoBoxMetric(dict(enumerate(class_names(trainer.student.config))))
        metric.add_batch(predictions=[found for found, _ in everyone], references=[truth for _, truth in everyone])
        figures = [metric.compute()]
        trainer.record.precision["teacher"] = metric.precision
    broadcast_object_list(figures)
    return {f"teacher_{name}": value for name, value in figures[0].items()}


def detections_of(teacher: Teacher, batch: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What the teacher finds in each image of a batch, and what is there, on the host."""
    answers = seen_by(teacher, batch)
    # A teacher whose answers are no numbers finds nothing, and fails its check.
    boxes = answers.boxes.nan_to_num(0.5, 0.5, 0.5)
    answers = Predictions(answers.logits.nan_to_num(UNKNOWN), boxes, None, answers.activation)
    sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
    found, truth = detections_from_predictions(answers, sizes), references_from_labels(batch["labels"])
    images = [int(label["image_id"]) for label in batch["labels"]]
    return [
        (on_host(one) | {"image_id": image}, on_host(other) | {"image_id": image})
        for one, other, image in zip(found, truth, images, strict=True)
    ]


def seen_by(teacher: Teacher, batch: dict[str, Any]) -> Predictions:
    """What the teacher finds in a batch, from its own view where there is one."""
    view = "teacher_" if "teacher_pixel_values" in batch else ""
    return teacher(batch[f"{view}pixel_values"], batch.get(f"{view}pixel_mask")).found


def on_host(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: v.cpu().numpy() if isinstance(v, torch.Tensor) else v for name, v in tensors.items()}


def check_teacher(trainer: DistillationTrainer) -> None:
    """Evaluates the teacher on the evaluation set, or on images spread over it; `teacher_results.json` keeps the
    figures.

    Raises:
        ValueError: its mAP over the classes that it knows is below `min_teacher_map`.
    """
    args, teacher = trainer.args, trainer.distiller.teacher
    if teacher is None or args.min_teacher_map <= 0 or trainer.teacher_metrics is not None:
        return
    given = trainer.eval_dataset
    first = next(iter(given.values())) if isinstance(given, dict) else given
    if not isinstance(first, Sized):
        logger.warning("There is no evaluation set with a length to check the teacher on: it teaches unseen.")
        return
    dataset: Any = first
    images = min(len(dataset), args.teacher_check_samples or len(dataset))
    places = np.linspace(0, len(dataset) - 1, images).round().astype(int).tolist()
    metrics = evaluate_teacher(trainer, dataset if images == len(dataset) else Subset(dataset, places))
    trainer.save_metrics("teacher", metrics, combined=False)
    trainer.teacher_metrics = metrics
    names = class_figures(dict(enumerate(class_names(trainer.student.config))))
    known = [names[i] for i, column in enumerate(teacher.class_map.columns) if column is not None]
    values = [metrics[f"teacher_{name}"] for name in known if metrics[f"teacher_{name}"] >= 0]
    if not values:
        logger.warning(f"None of the {images} evaluation images shows a class of the teacher: it teaches unseen.")
        return
    found = sum(values) / len(values)
    trainer.announce(f"The teacher has a mAP of {found:.3f} on {images} evaluation images.")
    refuse_weak_teacher(found, args.min_teacher_map, images, teacher.class_map.table())
