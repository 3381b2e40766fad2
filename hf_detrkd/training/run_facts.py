"""Facts and metrics of a run that its record takes from the trainer."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sized
from typing import Any, cast

from transformers import TrainerState

from ..adapters import class_names
from ..artifacts.hub.background_push import HubPush
from ..artifacts.record import figures_row
from ..data import DetectionDataset, RowStream
from ..distillation.distiller import Distiller
from ..distillation.stored_teacher import StoredTeacher
from ..distillation.teacher import Teacher
from ..evaluation.efficiency import device_name
from ..methods import DistillationMethod
from .config import DistillationConfig
from .train_data import has_unlabeled


PACKAGES = ("hf-detrkd", "torch", "transformers", "accelerate", "datasets", "huggingface_hub", "timm")


def facts_of(
    args: DistillationConfig,
    distiller: Distiller,
    train_dataset: Any,
    eval_dataset: Any,
    mixed_precision: str,
    push: HubPush | None = None,
) -> dict[str, Any]:
    """Facts of a run by the names of [`~hf_detrkd.artifacts.run_folder.Run`].

    Args:
        args ([`DistillationConfig`])
        distiller ([`Distiller`])
        train_dataset, eval_dataset: facts that they do not provide are missing.
        mixed_precision (`str`): as accelerate names it.
        push ([`HubPush`], *optional*): destination of the run's uploads.
    """
    student, methods = distiller.student, cast(Iterable[DistillationMethod], distiller.methods.values())
    return {
        "method": args.method,
        "methods": list(distiller.methods),
        "papers": [dataclasses.asdict(method.paper) for method in methods if method.paper is not None],
        "teacher": teacher_facts(distiller.teacher),
        "family": student.config.model_type,
        "classes": class_names(student.config),
        **sizes_of(train_dataset, eval_dataset),
        "seed": args.seed,
        "device": device_name(args.device),
        "processes": args.world_size,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "mixed_precision": mixed_precision,
        "hub": None if push is None else push.facts,
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in PACKAGES},
    }


def sizes_of(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """Numbers of images, and their height and width in pixels."""
    sets = {"train_images": train_dataset, "eval_images": eval_dataset}
    found: dict[str, Any] = {name: len(data) for name, data in sets.items() if isinstance(data, Sized)}
    if isinstance(train_dataset, RowStream):
        found |= {"train_images": train_dataset.num_rows, "streamed": train_dataset.num_rows is None}
    if has_unlabeled(train_dataset):
        found["train_images"] = int(train_dataset.labeled().sum())
        found["unlabeled_images"] = len(train_dataset) - found["train_images"]
    if isinstance(eval_dataset, DetectionDataset):
        found["image_size"] = list(eval_dataset[0]["pixel_values"].shape[-2:])
    return found


def stored_rows(teacher: StoredTeacher, dataset: Any, id2label: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """The rows of the summary of teachers with stored answers, by name; without what was not measured on the data
    set."""
    rows = {}
    for name, one in teacher.by_name().items():
        figures = {key.removeprefix("teacher_"): v for key, v in (one.metrics(dataset, id2label) or {}).items()}
        rows[name] = figures_row(id2label, one.num_parameters, figures)
    return rows


def teacher_facts(teacher: Teacher | StoredTeacher | None) -> dict[str, str | None] | None:
    """The teacher's [`~hf_detrkd.distillation.teacher.Origin`]."""
    return None if teacher is None else dataclasses.asdict(teacher.origin)


def student_name(config: DistillationConfig) -> str:
    """The student's name in the summary, next to teacher and control."""
    return "distilled" if config.methods else "student"


def evaluation_of(state: TrainerState, load_best_model_at_end: bool, first: str | None = None) -> dict[str, Any]:
    """The logged metrics of the student's current weights: those of the last evaluation, or of the best checkpoint
    if it was loaded at the end and nothing was evaluated since. Of several evaluation sets those of the `first`."""
    history = state.log_history
    ended = max((place for place, row in enumerate(history) if "train_runtime" in row), default=len(history))
    start = "eval_" if first is None else f"eval_{first}_"
    rows = [
        (place, {name.replace(start, "eval_", 1): value for name, value in row.items()})
        for place, row in enumerate(history)
        if f"{start}map" in row
    ]
    if load_best_model_at_end and rows and rows[-1][0] < ended:
        rows = [(place, row) for place, row in rows if row["step"] == state.best_global_step] or rows
    return rows[-1][1] if rows else {}
