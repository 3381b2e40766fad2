"""Writes what a run has found into its output folder, for the card, the report and whoever reads it later."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters import class_names
from .efficiency import device_name
from .evaluation import class_figures
from .run_files import FACTS, PRECISION, SUMMARY, Run, portable


if TYPE_CHECKING:
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
        "seed": args.seed,
        "device": device_name(args.device),
        "processes": args.world_size,
        "hub": None if push is None else {"repo_id": push.repo_id, "private": push.private, "revision": push.revision},
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in PACKAGES},
    }


def teacher_facts(trainer: DistillationTrainer) -> dict[str, str] | None:
    """Name and revision of the teacher, in the words of the Hub where it is from there."""
    teacher, args = trainer.distiller.teacher, trainer.args
    if teacher is None:
        return None
    name = args.teacher_model_name_or_path or teacher.model.config.name_or_path or teacher.model.config.model_type
    return {"name": portable(name), "revision": args.teacher_model_revision}


def rows_of(trainer: DistillationTrainer) -> dict[str, dict[str, Any]]:
    """The figures of teacher and student that a trainer has by itself."""
    rows = {}
    teacher = trainer.distiller.teacher
    if teacher is not None:
        metrics = {n.removeprefix("teacher_"): v for n, v in (trainer.teacher_metrics or {}).items()}
        rows["teacher"] = row_of(teacher.model, metrics)
    last: dict[str, Any] = next((entry for entry in reversed(trainer.state.log_history) if "eval_map" in entry), {})
    metrics = {name.removeprefix("eval_"): value for name, value in last.items()}
    rows["distilled" if trainer.args.methods else "student"] = row_of(trainer.student, metrics)
    return rows


def row_of(
    model: Any, metrics: Mapping[str, float], seconds_per_step: float | None = None, **efficiency: Any
) -> dict[str, Any]:
    """A model's line of the summary.

    Args:
        model ([`~transformers.PreTrainedModel`])
        metrics (`dict[str, float]`): as [`CocoBoxMetric`] names them; where there are none, nothing was measured.
        seconds_per_step (`float`, *optional*): of its training.
        efficiency: `gflops` and `latency`, see [`~hf_detrkd.efficiency.measure_efficiency`].
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
