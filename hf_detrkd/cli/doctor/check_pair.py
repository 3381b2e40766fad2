"""The doctor's checks of student and teacher, as the run would build them."""

import dataclasses
from typing import Any, cast

import numpy as np

from ...data import DetectionSplits, DetectionTransform, parse_image_size
from ...data.processor import Normalization, normalization_of
from ...distillation.teacher import Teacher
from ...models.loading import load_processor
from ...training.trainer import DistillationTrainer
from ..arguments import Arguments
from ..run_setup import build_trainer
from . import NORMALIZATIONS, View
from .findings import Report


def build_pair(
    report: Report, arguments: Arguments, splits: DetectionSplits, folder: str
) -> DistillationTrainer | None:
    """The run's trainer with a temporary output folder; `None` if it rejects the pair."""
    config: Any = dataclasses.replace(
        cast(Any, arguments.config),
        output_dir=folder,
        push_to_hub=False,
        report_to="none",
        resume_from_checkpoint=None,
    )
    try:
        trainer = build_trainer(arguments, splits, config)
    except (ValueError, OSError) as error:
        report.problem("models", str(error))
        return None
    describe_student(report, trainer)
    if arguments.script.run_control:
        report.facts["control"] = True
    if isinstance(trainer.distiller.teacher, Teacher):
        describe_teacher(report, trainer)
    if trainer.distiller.teacher is not None:
        report.ok("method", f"{config.method} supports this pair.")
    return trainer


def describe_student(report: Report, trainer: DistillationTrainer) -> None:
    queries = trainer.distiller.adapter.spec.num_queries
    words, view = model_in_words(trainer.student), view_in_words(student_view(trainer))
    report.ok("student", f"{words}, {queries} queries; images {view}.")
    most = max(report.facts[name]["per_image"][1] for name in ("train", "evaluation"))
    if most > queries:
        report.warning("student", f"an image has {most} boxes, but the student detects at most {queries}.")


def describe_teacher(report: Report, trainer: DistillationTrainer) -> None:
    teacher: Any = trainer.distiller.teacher
    words, view = model_in_words(teacher.model), view_in_words(teacher_view(trainer))
    status = "ok" if teacher.class_map.is_complete else "warning"
    report.add(status, "teacher", f"{words}; images {view}.\n{teacher.class_map.table()}")


def student_view(trainer: DistillationTrainer) -> View:
    """The run's preprocessing for the student."""
    return View(dict(trainer.processing_class.size), normalization_of(trainer.processing_class))


def teacher_view(trainer: DistillationTrainer) -> View:
    """The run's preprocessing for the teacher."""
    size = parse_image_size(trainer.args.teacher_image_size) or student_view(trainer).size
    return View(size, normalization_of(teacher_processor(trainer)))


def teacher_processor(trainer: DistillationTrainer) -> Any:
    name, revision = trainer.args.teacher_model_name_or_path, trainer.args.teacher_model_revision
    return load_processor(name, revision=revision)


def model_in_words(model: Any) -> str:
    return f"{model.config.model_type}, {model.num_parameters():,} parameters, {model.config.num_labels} classes"


def view_in_words(view: View) -> str:
    return f"{size_in_words(view.size)}, {normalization_in_words(view.normalization)}"


def size_in_words(size: Any) -> str:
    parsed = DetectionTransform(size).size
    if parsed.shortest_edge is None:
        return f"of {parsed.height}x{parsed.width} pixels"
    return f"with a shorter side of {parsed.shortest_edge} and a longer of at most {parsed.longest_edge} pixels"


def normalization_in_words(normalization: Normalization) -> str:
    known = (name for name, value in NORMALIZATIONS.items() if np.array_equal(value, normalization))
    mean, deviation = (list(map(float, part)) for part in normalization)
    return next(known, f"mean {mean} and standard deviation {deviation}")
