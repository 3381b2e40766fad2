"""Plot of losses and mAP over the training steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...structures.loss_key import GRADIENT_SUFFIX
from ..run_folder import Run
from .style import TEACHER, color_of, finish, head


MOST_POINTS = 30  # values of a line; lines with more have no markers
LOG_RANGE = 30  # a loss whose largest value exceeds this many times its smallest gets a logarithmic axis
Series = dict[int, float]  # values by step


@dataclass(frozen=True)
class Panel:
    """One subplot: a series for each model, and the teacher's level."""

    title: str
    unit: str
    series: dict[str, Series]
    level: float | None = None


def draw_curves(run: Run) -> Figure | None:
    """Task loss, mAP, mAP50 and every distillation term over the steps, each in its own subplot, since the terms of
    a run differ by orders of magnitude. The teacher is a dashed level.

    Returns:
        [`~matplotlib.figure.Figure`] or `None`: `None` without a history.
    """
    panels = [panel for panel in curve_panels(run) if panel.series]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6.0, 3.7 * columns), 2.2 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax, panel in itertools.zip_longest(axes, panels):
        if panel is None:
            ax.remove()
        else:
            fill_panel(ax, panel)
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    lines = {name: Line2D([], [], color=color_of(name), marker="o", markersize=3) for name in names}
    if any(panel.level is not None for panel in panels):
        lines = {TEACHER: Line2D([], [], color=color_of(TEACHER), linestyle="--")} | lines
    head(figure, "Losses and mAP over the training", lines)
    return figure


def curve_panels(run: Run) -> list[Panel]:
    """All subplots, including those without values."""
    names = sorted(run.histories, key=lambda name: name == run.student)  # the student's line on top
    trained = {name: [row for row in run.histories[name] if "loss" in row] for name in names}
    prefixes = tuple(f"{method}_" for method in run.facts["methods"])
    keys = dict.fromkeys(key for rows in trained.values() for row in rows for key in row)
    terms = [key for key in keys if key.startswith(prefixes) and not key.endswith(GRADIENT_SUFFIX)]
    task = Panel("Task loss", "loss", series_of(trained, "task_loss"))
    weighted = Panel("Distillation, all terms", "loss, weighted", series_of(trained, "distillation_loss"))
    parts = [Panel(term, "loss, unweighted", series_of(trained, term)) for term in terms]
    precisions = []
    for key, title in {"map": "mAP", "map_50": "mAP50"}.items():
        series = {name: evaluations(run, name, key) for name in names}
        level = (run.models.get(TEACHER) or {}).get(key)
        level = None if level is None or level < 0 else 100 * level
        precisions.append(Panel(title, f"{title}, %", {n: values for n, values in series.items() if values}, level))
    return [task, *precisions, weighted, *parts]


def series_of(histories: Mapping[str, list[dict[str, Any]]], key: str) -> dict[str, Series]:
    """The values that each model logged under a name; models without any are omitted."""
    found = {name: {row["step"]: row[key] for row in rows if key in row} for name, rows in histories.items()}
    return {name: values for name, values in found.items() if values}


def evaluations(run: Run, name: str, key: str) -> Series:
    """A model's metric in percent over the steps; without evaluations during training, only the final one."""
    values: Series = {}
    for row in run.histories[name]:
        if row.get(f"eval_{key}", -1) >= 0:
            # A second value at a step is from the best checkpoint, which was loaded after the last step.
            values.setdefault(row["step"], 100 * row[f"eval_{key}"])
    final = (run.models.get(name) or {}).get(key)
    if not values and run.histories[name] and final is not None and final >= 0:
        values[run.histories[name][-1]["step"]] = 100 * final
    return values


def fill_panel(ax: Axes, panel: Panel) -> None:
    for name, series in panel.series.items():
        marker = "o" if len(series) <= MOST_POINTS else None
        size = 3 if len(series) > 1 else 6
        ax.plot(list(series), list(series.values()), color=color_of(name), marker=marker, markersize=size, label=name)
    values = [value for series in panel.series.values() for value in series.values()]
    if panel.level is not None:
        ax.axhline(panel.level, color=color_of(TEACHER), linestyle="--", label=TEACHER)
    if panel.unit.startswith("loss") and min(values) > 0 and max(values) > LOG_RANGE * min(values):
        ax.set_yscale("log")
    elif min(values) >= 0:
        ax.set_ylim(0, 1.08 * max([*values, panel.level or 0]) or 1)
    ax.set_xlim(left=0)
    ax.set_title(panel.title, fontsize=9)
    ax.set_xlabel("training step", fontsize=8)
    ax.set_ylabel(panel.unit, fontsize=8)
    finish(ax)
