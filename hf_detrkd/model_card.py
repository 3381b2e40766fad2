"""The card of a student: what it was distilled from, what it gained, what it costs. All figures are the run's own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .config import method_names
from .methods import METHODS
from .methods.base import Paper
from .run_files import Run, portable


TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
CARD = "README.md"
UNMEASURED = "not measured"
METRICS = {"map": "mAP", "map_50": "mAP50", "map_75": "mAP75"}
PICTURES = {
    "predictions.png": "Predictions: the first images, then those in which the student errs most",
    "curves.png": "Loss and mAP over the training",
    "per_class.png": "AP by class",
    "pr_curves.png": "Precision and recall",
}


def write_card(
    run: Run,
    repo_id: str | None = None,
    license: str | None = None,
    language: str | None = None,
    tags: Sequence[str] = (),
) -> Path:
    """Writes `README.md` into a run's folder.

    Args:
        run ([`~hf_detrkd.run_files.Run`])
        repo_id (`str`, *optional*): where the student will be; default: its folder's name.
        license (`str`, *optional*): the student's, for example `apache-2.0`; default: none is stated.
        language (`str`, *optional*), tags (`Sequence[str]`): further metadata.
    """
    repo_id = repo_id or run.folder.resolve().name
    facts, row = run.facts, run.models.get(run.student, {})
    methods = method_names(facts.get("method", "none"))
    card = ModelCard.from_template(
        card_data(run, repo_id, license=license, language=language, tags=tags),
        template_path=str(TEMPLATE),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        own_code=any(run.folder.glob("modeling_*.py")),
        summary=summary(run, methods),
        models=run.models,
        models_table=models_table(run.models),
        classes_table=classes_table(run.models),
        dataset=known(facts, "dataset_name"),
        split=known(facts, "eval_split"),
        train_split=known(facts, "train_split"),
        train_images=known(facts, "train_images"),
        eval_images=known(facts, "eval_images"),
        image_size=size_text(facts.get("image_size")),
        device=known(facts, "device"),
        pictures=[(title, file) for file, title in PICTURES.items() if (run.folder / file).is_file()],
        method_text=method_text(methods, facts.get("teacher")),
        papers=papers_of(methods),
        seed=known(facts, "seed"),
        command=known(facts, "command"),
        recipe_table=table(["argument", "value"], [[f"`{k}`", f"`{v}`"] for k, v in portable(run.recipe).items()]),
        versions="Made with " + ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items()) + ".",
        class_names=", ".join(facts.get("classes") or row.get("classes") or [UNMEASURED]),
    )
    file = run.folder / CARD
    card.save(file)
    return file


def card_data(
    run: Run, repo_id: str, license: str | None = None, language: str | None = None, tags: Sequence[str] = ()
) -> ModelCardData:
    """The card's metadata."""
    facts, row = run.facts, run.models.get(run.student, {})
    teacher = facts.get("teacher") or {}
    hub_data = facts.get("hub_dataset")
    own = ["hf-detrkd", "object-detection", *(["knowledge-distillation"] if teacher else [])]
    own += method_names(facts.get("method", "none"))
    split, name = facts.get("eval_split"), known(facts, "dataset_name")
    results = [
        EvalResult(
            task_type="object-detection",
            task_name="Object detection",
            dataset_type=hub_data or name,
            dataset_name=name,
            dataset_split=split,
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
        license=license,
        language=language,
        tags=list(dict.fromkeys([*own, *tags])),
        model_name=repo_id.split("/")[-1],
        eval_results=results or None,
        teacher=teacher.get("name"),
        teacher_revision=teacher.get("revision"),
    )


def summary(run: Run, methods: Sequence[str]) -> str:
    """What the student is, in a sentence or two, with its gain."""
    row, teacher = run.models.get(run.student, {}), run.facts.get("teacher")
    size = "" if row.get("parameters") is None else f" of {row['parameters'] / 1e6:.2f} M parameters"
    kind = run.facts.get("family", "detector")
    origin = f", distilled from `{teacher['name']}` by {' and '.join(methods)}" if teacher else ""
    text = f"An object detector ({kind}{size}){origin}."
    if row.get("map") is None:
        return text
    text += f" It reaches {percent(row['map'])} mAP"
    control = run.models.get("control", {}).get("map")
    if control is not None:
        text += f", where the same student without a teacher reaches {percent(control)}"
    return text + "."


def models_table(models: dict[str, dict[str, Any]]) -> str:
    """One row for each model of the run."""
    header = ["", "mAP", "mAP50", "mAP75", "parameters", "GFLOPs", "latency, ms", "s / training step"]
    rows = [
        [
            name,
            *(percent(row.get(key)) for key in METRICS),
            figure(row.get("parameters"), ",.0f"),
            figure(row.get("gflops"), ".2f"),
            latency_text(row.get("latency")),
            "" if name == "teacher" else figure(row.get("seconds_per_step"), ".3f"),
        ]
        for name, row in models.items()
    ]
    return table(header, rows)


def classes_table(models: dict[str, dict[str, Any]]) -> str:
    """One row for each class."""
    names = list(dict.fromkeys(itertools.chain(*((row.get("classes") or {}) for row in models.values()))))
    if not names:
        return UNMEASURED
    rows = [[name, *(percent((row.get("classes") or {}).get(name)) for row in models.values())] for name in names]
    return table(["class", *models], rows)


def method_text(methods: Sequence[str], teacher: dict[str, Any] | None) -> str:
    """How the student was trained."""
    if not methods:
        return "Trained without a teacher."
    named = " and ".join(f"`{name}`" for name in methods)
    if teacher is None:
        return f"Trained without a teacher, with {named}."
    return f"Distilled from `{teacher['name']}` (revision `{teacher['revision']}`) by {named}."


def papers_of(methods: Sequence[str]) -> list[Paper]:
    return [paper for name in methods if name in METHODS and (paper := METHODS[name].paper) is not None]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def known(facts: dict[str, Any], name: str) -> Any:
    """A fact, or the words that it is unknown."""
    return UNMEASURED if facts.get(name) is None else facts[name]


def percent(value: float | None) -> str:
    return figure(None if value is None or value < 0 else 100 * value, ".1f")


def figure(value: float | None, form: str) -> str:
    return UNMEASURED if value is None else format(value, form)


def size_text(size: Sequence[int] | None) -> str:
    return UNMEASURED if size is None else f"{size[0]} x {size[1]}"


def latency_text(latency: dict[str, dict[str, float]] | None) -> str:
    """Of one image, with its spread."""
    one = (latency or {}).get("1")
    return UNMEASURED if one is None else f"{one['median_ms']:.1f} ({one['low_ms']:.1f} to {one['high_ms']:.1f})"
