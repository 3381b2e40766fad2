"""Writes the model card of a student: its teacher, gain and cost, all as measured in its own run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .markdown import code, plain
from .redaction import portable
from .run_folder import SEEN, Run, is_teacher
from .whole_files import make_whole


TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
CARD = "README.md"
BAR = re.compile(r"(?<!\\)\|")
UNMEASURED = "not measured"
METRICS = {"map": "mAP", "map_50": "mAP50", "map_75": "mAP75"}
PICTURES = {
    "predictions.png": f"Predictions: the first images, and of the first {SEEN} those with most student errors",
    "curves.png": "Loss and mAP over the training",
    "per_class.png": "AP by class",
    "pr_curves.png": "Precision and recall",
}


def write_card(run: Run, repo_id: str | None = None) -> Path:
    """Writes `README.md` into a run's folder.

    Args:
        run ([`~hf_detrkd.artifacts.run_folder.Run`])
        repo_id (`str`, *optional*): repository of the student on the Hub; default: none.
    """
    facts, row = run.facts, run.models.get(run.student, {})
    methods = facts["methods"]
    card = ModelCard.from_template(
        card_data(run, repo_id),
        template_path=str(TEMPLATE),
        name=title_of(run, repo_id),
        repo_id=repo_id or "path/to/this/folder",
        own_code=any(run.folder.glob("modeling_*.py")),
        summary=summary(run, methods),
        models=run.models,
        models_table=models_table(run.models),
        measured=measured_text(run.models, known(facts, "device")),
        classes_table=classes_table(run.models),
        dataset=code(known(facts, "dataset_name")),
        split=code(known(facts, "eval_split")),
        train_split=code(known(facts, "train_split")),
        train_images="a stream of" if facts.get("streamed") else known(facts, "train_images"),
        unlabeled_images=facts.get("unlabeled_images"),
        eval_images=known(facts, "eval_images"),
        pictures=[(title, file) for file, title in PICTURES.items() if (run.folder / file).is_file()],
        method_text=method_text(methods, facts.get("teacher")),
        papers=facts.get("papers") or [],
        training=training_text(facts),
        command=known(facts, "command"),
        recipe_table=arguments_table(run.recipe),
        arguments_table=arguments_table(facts.get("arguments") or {}),
        versions="Made with " + ", ".join(f"{k} {v}" for k, v in (facts.get("versions") or {}).items()) + ".",
        class_names=", ".join(map(plain, facts.get("classes") or row.get("classes") or [UNMEASURED])),
    )
    file = run.folder / CARD
    make_whole(file, card.save)
    return file


def title_of(run: Run, repo_id: str | None) -> str:
    """The given title, or the last part of the repository's or folder's name."""
    return (run.facts.get("card") or {}).get("title") or (repo_id or run.folder.resolve().name).split("/")[-1]


def card_data(run: Run, repo_id: str | None) -> ModelCardData:
    """The card's metadata."""
    facts, row = run.facts, run.models.get(run.student, {})
    card = facts.get("card") or {}
    teacher = facts.get("teacher") or {}
    hub_data = facts.get("hub_dataset")
    own = ["hf-detrkd", "object-detection", *(["knowledge-distillation"] if teacher else [])]
    own += facts["methods"]
    split, name = facts.get("eval_split"), known(facts, "dataset_name")
    results = [
        EvalResult(
            task_type="object-detection",
            task_name="Object detection",
            dataset_type=hub_data or name,
            dataset_name=name,
            dataset_split=split,
            dataset_args=None if facts.get("eval_images") is None else {"images": facts["eval_images"]},
            metric_type=label,
            metric_name=label,
            metric_value=row[key],
        )
        for key, label in METRICS.items()
        if row.get(key) is not None
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="object-detection",
        base_model=facts.get("base_model"),
        datasets=None if hub_data is None else [hub_data],
        license=card.get("license"),
        language=card.get("language"),
        tags=list(dict.fromkeys([*own, *(card.get("tags") or [])])),
        model_name=title_of(run, repo_id),
        eval_results=results or None,
        teacher=teacher.get("name"),
        teacher_revision=teacher.get("revision"),
    )


def summary(run: Run, methods: Sequence[str]) -> str:
    """The student and its gain in one or two sentences."""
    row, teacher = run.models.get(run.student, {}), run.facts.get("teacher")
    size = "" if row.get("parameters") is None else f" of {row['parameters'] / 1e6:.2f} M parameters"
    kind = run.facts.get("family", "detector")
    origin = f", distilled from {code(teacher['name'])} by {' and '.join(methods)}" if teacher else ""
    text = f"An object detector ({kind}{size}){origin}."
    if row.get("map") is None:
        return text
    text += f" It reaches {percent(row['map'])} mAP"
    control = run.models.get("control", {}).get("map")
    if control is not None:
        text += f"; the same student trained without a teacher reaches {percent(control)}"
    return text + "."


def models_table(models: dict[str, dict[str, Any]]) -> str:
    """One row for each model of the run."""
    batches = sorted({"1", *itertools.chain(*((row.get("latency") or {}) for row in models.values()))}, key=int)
    header = ["", *METRICS.values(), "parameters", "GFLOPs", "ms / image", f"images / s, batch {batches[-1]}"]
    rows = [
        [
            name,
            *(percent(row.get(key)) for key in METRICS),
            figure(row.get("parameters"), ",.0f"),
            figure(row.get("gflops"), ".2f"),
            latency_text(row, "1"),
            throughput_text(row, batches[-1]),
            "" if is_teacher(name) else figure(row.get("seconds_per_step"), ".3f"),
        ]
        for name, row in models.items()
    ]
    return table([*header, "s / training step"], rows)


def measured_text(models: dict[str, dict[str, Any]], device: str) -> str:
    """Conditions of the GFLOPs and latency measurements; empty if there are none."""
    ways = {
        name: f"{size_text(row.get('image_size'))} pixels, {row.get('precision', 'precision unknown')}"
        for name, row in models.items()
        if row.get("latency")
    }
    if not ways:
        return ""
    same = len(set(ways.values())) == 1
    how = next(iter(ways.values())) if same else "; ".join(f"{name}: {way}" for name, way in ways.items())
    return f"GFLOPs are for one image; latency is that of forward passes on {device}, median and quartiles ({how})."


def classes_table(models: dict[str, dict[str, Any]]) -> str:
    """One row for each class."""
    found = [row.get("classes") or {} for row in models.values()]
    names = list(dict.fromkeys(itertools.chain(*found)))
    if not names:
        return UNMEASURED
    return table(["class", *models], [[plain(name), *(percent(one.get(name)) for one in found)] for name in names])


def method_text(methods: Sequence[str], teacher: dict[str, Any] | None) -> str:
    """The method and teacher of the student in a sentence."""
    if not methods:
        return "Trained without a teacher."
    named = " and ".join(f"`{name}`" for name in methods)
    if teacher is None:
        return f"Trained without a teacher, with {named}."
    return f"Distilled from {teacher_text(teacher)} by {named}."


def teacher_text(teacher: dict[str, Any]) -> str:
    """Name of a teacher, with its commit on the Hub or its other source."""
    where = {"folder": " (a local folder)", "memory": " (passed as an object)"}
    revision = "" if teacher.get("revision") is None else f" (revision {code(teacher['revision'])})"
    return f"{code(teacher['name'])}{where.get(str(teacher.get('source')), revision)}"


def training_text(facts: dict[str, Any]) -> str:
    """Seed, batch and precision of the training."""
    processes = facts.get("processes")
    parts = [] if facts.get("steps") is None else [f"{facts['steps']:,} steps"]
    parts += [f"seed {known(facts, 'seed')}", f"batches of {known(facts, 'batch_size')} images"]
    parts += [] if processes in (None, 1) else [f"on {processes} processes"]
    parts += [] if facts.get("mixed_precision") in (None, "no") else [f"in {facts['mixed_precision']}"]
    return ", ".join(parts)


def arguments_table(arguments: dict[str, Any]) -> str:
    return table(["argument", "value"], [[code(k), code(v)] for k, v in portable(arguments).items()])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; vertical bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(BAR.sub(r"\\|", cell) for cell in line) + " |" for line in lines)


def known(facts: dict[str, Any], name: str) -> Any:
    """A fact, or `not measured` if it is unknown."""
    return UNMEASURED if facts.get(name) is None else facts[name]


def percent(value: float | None) -> str:
    return figure(None if value is None or value < 0 else 100 * value, ".1f")


def figure(value: float | None, form: str) -> str:
    return UNMEASURED if value is None else format(value, form)


def size_text(size: Sequence[int] | None) -> str:
    return UNMEASURED if size is None else f"{size[0]} x {size[1]}"


def latency_text(row: dict[str, Any], batch: str) -> str:
    """Median and quartiles of the latency of a batch."""
    one = (row.get("latency") or {}).get(batch)
    return UNMEASURED if one is None else f"{one['median_ms']:.1f} ({one['low_ms']:.1f} to {one['high_ms']:.1f})"


def throughput_text(row: dict[str, Any], batch: str) -> str:
    """Images per second of a batch, at the median."""
    return figure(((row.get("latency") or {}).get(batch) or {}).get("images_per_second"), ".1f")
