"""The doctor's checks by the teacher's predictions: box format, preprocessing, class order and mAP."""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ...data import DetectionDataset, DetectionSplits, DetectionTransform
from ...distillation.class_map import ClassMap
from ...distillation.teacher import NO_NORMALIZATION, Teacher
from ...training.trainer import DistillationTrainer
from . import NORMALIZATIONS, Seen, View, better_frame, confusion, look, map_of, reframed, renamed, with_renamed
from .check_pair import teacher_processor, teacher_view, view_in_words
from .findings import Report


@dataclass(frozen=True)
class Look:
    """Predictions of a teacher for a view, and its mAP after correction of the class order."""

    view: View
    seen: list[Seen]
    renamed: dict[int, int]
    map: float

    @classmethod
    def of(cls, view: View, seen: list[Seen], classes: ClassMap) -> "Look":
        counts = confusion(seen, len(classes.student), len(classes.teacher))
        other = renamed(counts, classes.columns)
        return cls(view, seen, other, map_of(seen, with_renamed(classes.columns, other), classes.student))


def check_teacher(report: Report, trainer: DistillationTrainer, splits: DetectionSplits, samples: int) -> None:
    """Checks box format, preprocessing, class order and mAP on images spread over the evaluation set."""
    teacher: Any = trainer.distiller.teacher
    classes = teacher.class_map
    count = min(samples, len(splits.eval))
    images = splits.eval.select(np.linspace(0, len(splits.eval) - 1, count).round().astype(int))
    views = candidate_views(trainer)
    seen = ask(trainer, images, views)
    mean = map_of(seen[0], classes.columns, classes.student)
    report.facts["teacher"] = {"map": mean, "images": count}
    seen = check_frame(report, seen)
    looks = [Look.of(view, found, classes) for view, found in zip(views, seen, strict=True)]
    check_classes(report, check_preprocessing(report, looks), classes)
    least = trainer.args.min_teacher_map
    if math.isnan(mean):
        report.warning("teacher", f"{count} evaluation images contain no class that it knows: it cannot be checked.")
    elif mean < least:
        report.problem(
            "teacher",
            f"it has {100 * mean:.1f} mAP on {count} evaluation images, below the minimum of {100 * least:g}.",
        )
    else:
        report.ok("teacher", f"it has {100 * mean:.1f} mAP on {count} evaluation images.")


def candidate_views(trainer: DistillationTrainer) -> list[View]:
    """The run's preprocessing for the teacher, and others: its processor's size, and the usual normalisations."""
    given, own = teacher_view(trainer), dict(teacher_processor(trainer).size)
    same = DetectionTransform(own).size == DetectionTransform(given.size).size
    others = [kind for kind in NORMALIZATIONS.values() if not np.array_equal(kind, given.normalization)]
    sizes = [given.size] if same else [given.size, own]
    return [View(size, kind) for size in sizes for kind in (given.normalization, *others)]


def ask(trainer: DistillationTrainer, images: DetectionDataset, views: list[View]) -> list[list[Seen]]:
    """The teacher's predictions for each view, in its own classes."""
    teacher: Any = trainer.distiller.teacher
    alone = Teacher(teacher.model, teacher.class_map.teacher, teacher.dtype)  # without a normalisation
    shown = tqdm(views, desc="Running the teacher", unit="view", leave=False)
    # One by one at sizes that the run does not use: families without masks take no padded batches.
    sizes = [trainer.args.eval_batch_size if view.size == views[0].size else 1 for view in views]
    return [look(alone, images, view, size) for view, size in zip(shown, sizes, strict=True)]


def check_frame(report: Report, seen: list[list[Seen]]) -> list[list[Seen]]:
    """Checks the format of the annotated boxes; returns the predictions with corrected boxes."""
    found = better_frame(seen[0])
    if found is None:
        report.ok("frame", "nothing suggests that the annotated boxes have a wrong format.")
        return seen
    words, frame, now, then = found
    report.problem(
        "frame",
        f"{100 * now:.0f} % of the annotated boxes match the teacher's as they are, and {100 * then:.0f} % when "
        f"read as {words}: write them as x, y, width, height in pixels of the image files.",
    )
    return [reframed(images, frame) for images in seen]


def check_preprocessing(report: Report, looks: list[Look]) -> Look:
    """Checks if another preprocessing suits the teacher far better; returns the best look."""
    given, best = looks[0], max(looks, key=lambda one: -1.0 if math.isnan(one.map) else one.map)
    report.facts["views"] = [{"view": view_in_words(one.view), "map": one.map} for one in looks]
    if math.isnan(given.map):  # the images contain none of its classes
        return given
    if best.map < 0.1:
        report.warning("preprocessing", "the teacher detects almost nothing with any preprocessing.")
        return given
    if best.map < given.map + 0.05 or best.map < 1.1 * given.map:
        report.ok("preprocessing", f"none is clearly better for the teacher than images {view_in_words(given.view)}.")
        return given
    text = (
        f"with images {view_in_words(given.view)} the teacher has {100 * given.map:.1f} mAP, and {100 * best.map:.1f} "
        f"with images {view_in_words(best.view)}: {remedy_for(given.view, best.view)}."
    )
    report.add("problem" if given.map < 0.6 * best.map else "warning", "preprocessing", text)
    return best


def remedy_for(given: View, best: View) -> str:
    """Instructions that give the teacher its correct preprocessing in a run."""
    remedies = []
    size = DetectionTransform(best.size).size
    if size != DetectionTransform(given.size).size:
        fixed = f"pass --teacher_image_size {size.height}x{size.width}"
        remedies.append(fixed if size.shortest_edge is None else "pass --keep_aspect_ratio with that --image_size")
    if best.normalization is not given.normalization:
        mean, deviation = (list(part) for part in best.normalization)
        plain = best.normalization is NO_NORMALIZATION
        entries = {"do_normalize": not plain} | ({} if plain else {"image_mean": mean, "image_std": deviation})
        remedies.append(f"set {json.dumps(entries)[1:-1]} in the teacher's preprocessor_config.json")
    return " and ".join(remedies)


def check_classes(report: Report, found: Look, classes: ClassMap) -> None:
    """Checks the class map against the classes that the teacher predicts."""
    if not found.renamed:
        report.ok("class order", "the teacher's predictions agree with the class map.")
        return
    columns, ours, names = classes.columns, classes.student, classes.teacher
    counts = confusion(found.seen, len(ours), len(names))
    said = [
        f"{ours[i]} as {names[other]!r} ({counts[i, other]} of {counts[i].sum()})"
        for i, other in found.renamed.items()
    ]
    fixed = with_renamed(columns, found.renamed)
    lines = [f"{ours[i]}: {'null' if c is None else names[c]}" for i, c in enumerate(fixed) if c != columns[i]]
    before = map_of(found.seen, columns, ours)
    report.add(
        "problem" if any(columns[i] is not None for i in found.renamed) else "warning",
        "class order",
        f"the teacher classifies {', '.join(said)}; with these exchanged it has {100 * found.map:.1f} mAP "
        f"instead of {100 * before:.1f}: correct id2label in its config.json or the data set's categories, whichever "
        "is wrong, or pass --class_map with the lines\n" + "\n".join(lines),
    )
