"""Writes what a run has found into its output folder, for the card, the report and whoever reads it later."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters import class_names
from .data import DetectionDataset
from .efficiency import device_name
from .evaluation import class_figures
from .privacy import portable
from .run_files import FACTS, PRECISION, SUMMARY, Run


if TYPE_CHECKING:
    from .config import DistillationConfig
    from .trainer import DistillationTrainer


PACKAGES = ("hf-detrkd", "torch", "transformers", "accelerate", "datasets", "huggingface_hub", "timm")


@dataclass
class Record:
    """What a run has found beyond what its trainer knows by itself; see [`Run`] for the names."""

    facts: dict[str, Any] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)


def write_run_files(trainer: DistillationTrainer) -> Run:
    """Writes facts, summary and precision into the output folder of a trainer, and reads the folder."""
    folder, record = Path(trainer.args.output_dir), trainer.record
    write_json(folder / FACTS, facts_of(trainer) | portable(record.facts))
    write_json(folder / SUMMARY, record.models or rows_of(trainer))
    if record.precision:
        (folder / PRECISION).write_text(json.dumps(record.precision))
    return Run.read(folder)


def facts_of(trainer: DistillationTrainer) -> dict[str, Any]:
    """What a trainer knows of its run."""
    args, student, push = trainer.args, trainer.student, trainer.push_in_progress
    return {
        "method": args.method,
        "teacher": teacher_facts(trainer),
        "family": student.config.model_type,
        "classes": class_names(student.config),
        **sizes_of(trainer),
        "seed": args.seed,
        "device": device_name(args.device),
        "processes": args.world_size,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "mixed_precision": trainer.accelerator.mixed_precision,
        "hub": None if push is None else push.facts,
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in PACKAGES},
    }


def sizes_of(trainer: DistillationTrainer) -> dict[str, Any]:
    """How many images there are, and their height and width in pixels; without what the data sets do not tell."""
    sets = {"train_images": trainer.train_dataset, "eval_images": trainer.eval_dataset}
    found: dict[str, Any] = {name: len(data) for name, data in sets.items() if isinstance(data, Sized)}
    if isinstance(trainer.eval_dataset, DetectionDataset):
        found["image_size"] = list(trainer.eval_dataset[0]["pixel_values"].shape[-2:])
    return found


def teacher_facts(trainer: DistillationTrainer) -> dict[str, str | None] | None:
    """The teacher's [`~hf_detrkd.teacher.Origin`], without folders of this machine."""
    teacher = trainer.distiller.teacher
    return None if teacher is None else portable(asdict(teacher.origin))


def rows_of(trainer: DistillationTrainer) -> dict[str, dict[str, Any]]:
    """The figures of teacher and student that a trainer has by itself."""
    rows = {}
    teacher = trainer.distiller.teacher
    if teacher is not None:
        seen, whole = trainer.args.teacher_check_samples, trainer.eval_dataset
        sampled = seen and isinstance(whole, Sized) and seen < len(whole)  # other images than the student's
        found = {} if sampled else trainer.teacher_metrics or {}
        rows["teacher"] = row_of(teacher.model, {n.removeprefix("teacher_"): v for n, v in found.items()})
    metrics = {name.removeprefix("eval_"): value for name, value in evaluation_of(trainer).items()}
    rows[student_name(trainer.args)] = row_of(trainer.student, metrics)
    return rows


def student_name(config: DistillationConfig) -> str:
    """What the student is called beside teacher and control."""
    return "distilled" if config.methods else "student"


def evaluation_of(trainer: DistillationTrainer) -> dict[str, Any]:
    """What was logged of the student as it is now: the last evaluation, or that of the best checkpoint where this was
    loaded at the end and nothing was evaluated since."""
    state, history = trainer.state, trainer.state.log_history
    ended = max((place for place, row in enumerate(history) if "train_runtime" in row), default=len(history))
    rows = [(place, row) for place, row in enumerate(history) if "eval_map" in row]
    if trainer.args.load_best_model_at_end and rows and rows[-1][0] < ended:
        rows = [(place, row) for place, row in rows if row["step"] == state.best_global_step] or rows
    return rows[-1][1] if rows else {}


def row_of(
    model: Any, metrics: Mapping[str, float], seconds_per_step: float | None = None, **efficiency: Any
) -> dict[str, Any]:
    """A model's line of the summary.

    Args:
        model ([`~transformers.PreTrainedModel`])
        metrics (`dict[str, float]`): as [`CocoBoxMetric`] names them; where there are none, nothing was measured.
        seconds_per_step (`float`, *optional*): of its training.
        efficiency: see [`~hf_detrkd.efficiency.measure_efficiency`].
    """
    classes = {model.config.id2label[number]: key for number, key in class_figures(model.config.id2label).items()}
    found = {name: metrics[key] for name, key in classes.items() if key in metrics}
    return {
        **{key: metrics.get(key) for key in ("map", "map_50", "map_75")},
        "parameters": model.num_parameters(),
        "seconds_per_step": seconds_per_step,
        "classes": {name: value if value >= 0 else None for name, value in found.items()},
        **efficiency,
    }


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
