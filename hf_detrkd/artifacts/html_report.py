"""Writes the HTML report of a run: metrics, classes, plots, and the arguments to repeat the run."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .model_card import (
    METRICS,
    PICTURES,
    UNMEASURED,
    figure,
    latency_text,
    measured_text,
    percent,
    size_text,
    teacher_text,
    throughput_text,
)
from .redaction import portable
from .run_folder import Run
from .whole_files import write_whole


REPORT = "report.html"
NO_OBJECTS = "no objects"
ALTERNATIVES = {
    "predictions.png": "Images of the evaluation set: the ground truth next to each model's predictions, boxes with "
    "class and score.",
    "curves.png": "Charts over the training steps: task loss, mAP and mAP50 of each model, and every distillation "
    "term; the teacher's mAP is a dashed level.",
    "per_class.png": "Bars of each model's AP for every class; the table by class holds the same values.",
    "pr_curves.png": "Precision over recall: each model's mean over the classes, and the student's classes.",
}


def write_report(run: Run) -> Path:
    """Writes `report.html` into a run's folder: one self-contained file with its images, without external
    resources or scripts.

    Args:
        run ([`~hf_detrkd.artifacts.run_folder.Run`]): includes the images in its folder.

    Returns:
        `Path`: the page. It shows only the last part of absolute paths, and no tokens.
    """
    environment = Environment(loader=PackageLoader("hf_detrkd.artifacts"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template(REPORT).render(
        title=title_of(run),
        gain=gain_of(run),
        models=list(run.models),
        measures=measures_of(run),
        measured=measured_text(run.models, shown(run.facts.get("device") or UNMEASURED)),
        classes=classes_of(run),
        pictures=pictures_of(run),
        dataset=dataset_of(run.facts),
        recipe={name: shown(value) for name, value in portable(run.recipe).items()},
        arguments={name: shown(value) for name, value in portable(run.facts.get("arguments") or {}).items()},
        command=shown(run.facts.get("command") or UNMEASURED),
        setting=setting_of(run.facts),
    )
    file = run.folder / REPORT
    write_whole(file, page)
    return file


def title_of(run: Run) -> str:
    """Method, teacher and student."""
    student = shown(run.facts.get("base_model") or run.folder.resolve().name)
    method, teacher = run.facts.get("method") or "none", run.facts.get("teacher")
    if teacher:
        return f"{method}: {shown(teacher['name'])} → {student}"
    return f"{student}, trained without a teacher" + ("" if method == "none" else f" ({method})")


def gain_of(run: Run) -> str:
    """The student's mAP and gain in a sentence; empty if it was not evaluated."""
    value = (run.models.get(run.student) or {}).get("map")
    if value is None or value < 0:
        return ""
    parts = []
    for other in ("control", "teacher"):
        compared = (run.models.get(other) or {}).get("map")
        if compared is not None and compared >= 0:
            gap = 100 * (value - compared)
            parts.append(f"{abs(gap):.1f} points {'more' if gap >= 0 else 'less'} than the {other}")
    return f"The student reaches {percent(value)} mAP" + (f": {' and '.join(parts)}." if parts else ".")


def measures_of(run: Run) -> list[tuple[str, list[str]]]:
    """Rows of the main table: a name, and a cell for each model."""
    rows = [row or {} for row in run.models.values()]
    batches = sorted({"1", *itertools.chain.from_iterable(row.get("latency") or {} for row in rows)}, key=int)
    forms = {"parameters": ("Parameters", ",.0f"), "gflops": ("GFLOPs / image", ".2f")}
    return [
        *((f"{label}, %", [percent(row.get(key)) for row in rows]) for key, label in METRICS.items()),
        *((label, [figure(row.get(key), form) for row in rows]) for key, (label, form) in forms.items()),
        *((f"Latency at batch {batch}, ms", [latency_text(row, batch) for row in rows]) for batch in batches),
        *((f"Images / s at batch {batch}", [throughput_text(row, batch) for row in rows]) for batch in batches),
        ("Training, s / step", [figure(row.get("seconds_per_step"), ".3f") for row in rows]),
    ]


def classes_of(run: Run) -> list[tuple[str, list[str]]]:
    """Rows of the table by class, in the data set's order."""
    found = [(row or {}).get("classes") or {} for row in run.models.values()]
    names = dict.fromkeys(itertools.chain.from_iterable(found))
    return [(name, [class_cell(classes, name) for classes in found]) for name in names]


def class_cell(classes: dict[str, float | None], name: str) -> str:
    return NO_OBJECTS if name in classes and classes[name] is None else percent(classes.get(name))


def pictures_of(run: Run) -> list[dict[str, str]]:
    """The images in the run's folder, base64-encoded."""
    return [
        {
            "title": PICTURES[name],
            "alternative": text,
            "data": base64.b64encode((run.folder / name).read_bytes()).decode(),
        }
        for name, text in ALTERNATIVES.items()
        if (run.folder / name).is_file()
    ]


def dataset_of(facts: dict[str, Any]) -> dict[str, str]:
    """Known facts of the data set."""
    names = facts.get("classes")
    return {
        "Data set": shown(facts.get("dataset_name") or UNMEASURED),
        "Training": training_text(facts),
        "Evaluation": split_text(facts.get("eval_split"), facts.get("eval_images")),
        "Image size": f"{size_text(facts.get('image_size'))} pixels" if facts.get("image_size") else UNMEASURED,
        "Classes": f"{len(names)}: {', '.join(names)}" if names else UNMEASURED,
    }


def training_text(facts: dict[str, Any]) -> str:
    """The training split, and the number of images beside it that have no labels."""
    text, more = split_text(facts.get("train_split"), facts.get("train_images")), facts.get("unlabeled_images")
    return f"{text}, and {more:,} without labels" if more else text


def split_text(name: str | None, images: int | None) -> str:
    return UNMEASURED if name is None else name + ("" if images is None else f", {images:,} images")


def setting_of(facts: dict[str, Any]) -> dict[str, str]:
    """Seed, machine and versions."""
    teacher = facts.get("teacher")
    named: dict[str, Any] = {}
    if teacher:
        named["Teacher"] = teacher_text(teacher).replace("`", "")
    named |= {"Seed": facts.get("seed"), "Device": facts.get("device"), "Processes": facts.get("processes")}
    named |= {"Batch": facts.get("batch_size"), "Mixed precision": facts.get("mixed_precision")}
    return {name: shown(UNMEASURED if value is None else value) for name, value in named.items()} | {
        name: shown(version) for name, version in (facts.get("versions") or {}).items()
    }


def shown(value: Any) -> str:
    """An argument or fact as redacted text: see [`write_report`]."""
    value = portable(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
