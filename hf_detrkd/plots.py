"""Pictures of a run: its losses and mAP over the steps, AP by class, precision over recall.

Each `draw_*` gives a [`~matplotlib.figure.Figure`], or `None` where the run's files hold nothing for it. A model has
the same colour in all of them; AP, precision and recall are in percent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .methods import METHODS
from .run_files import CONTROL, Run


TEACHER = "teacher"
# Okabe and Ito's colours: kinds of colour blindness tell them apart.
MODEL_COLORS = {TEACHER: "#444444", CONTROL: "#E69F00", "distilled": "#0072B2", "student": "#0072B2"}
CLASS_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
GREY = "#bbbbbb"
DPI = 150
MOST_BARS = 40  # classes; of more than these the best and the worst are drawn
MOST_POINTS = 30  # values of a line; of more than these none is marked by itself
UNNAMED = "_nolegend_"  # matplotlib's word for a line that no legend shows
LOG_RANGE = 30  # a line whose largest value is so many times its smallest gets a logarithmic axis
Series = dict[int, float]  # values by step


@dataclass(frozen=True)
class Panel:
    """One small chart of the curves: a series for each model, and the teacher's level."""

    title: str
    unit: str
    series: dict[str, Series]
    level: float | None = None


def write_plots(run: Run) -> list[Path]:
    """Draws what the run's files allow into its folder: `curves.png`, `per_class.png`, `pr_curves.png`.

    Args:
        run ([`~hf_detrkd.run_files.Run`])

    Returns:
        `list[Path]`: the pictures; what a run's files hold nothing for is left out.
    """
    files = []
    for name, draw in PLOTS.items():
        figure = draw(run)
        if figure is not None:
            files.append(run.folder / name)
            figure.savefig(files[-1], dpi=DPI)
    return files


def draw_curves(run: Run) -> Figure | None:
    """Task loss, mAP, mAP50 and every term of the distillation over the steps, each in a chart of its own, since
    terms of one run differ by orders of magnitude. The teacher is a dashed level.

    Returns:
        [`~matplotlib.figure.Figure`] or `None`: none without a history.
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
    """All charts of the curves, also those without a value."""
    names = sorted(run.histories, key=lambda name: name == run.student)  # the student's line on top
    trained = {name: [row for row in run.histories[name] if "loss" in row] for name in names}
    prefixes = tuple(f"{method}_" for method in METHODS)
    keys = dict.fromkeys(key for rows in trained.values() for row in rows for key in row)
    terms = [key for key in keys if key.startswith(prefixes)]
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
    """What each model logged under a name; models that did not are left out."""
    found = {name: {row["step"]: row[key] for row in rows if key in row} for name, rows in histories.items()}
    return {name: values for name, values in found.items() if values}


def evaluations(run: Run, name: str, key: str) -> Series:
    """A model's figure in percent over the steps; without evaluations in between, the last one's."""
    values: Series = {}
    for row in run.histories[name]:
        if row.get(f"eval_{key}", -1) >= 0:
            # What comes again at a step is of the best checkpoint, which was loaded after the last step.
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
    if min(values) > 0 and max(values) > LOG_RANGE * min(values):
        ax.set_yscale("log")
    elif min(values) >= 0:
        ax.set_ylim(0, 1.08 * max([*values, panel.level or 0]) or 1)
    ax.set_xlim(left=0)
    ax.set_title(panel.title, fontsize=9)
    ax.set_xlabel("training step", fontsize=8)
    ax.set_ylabel(panel.unit, fontsize=8)
    finish(ax)


def draw_per_class(run: Run) -> Figure | None:
    """AP of every class and model as bars, the student's best class first; of many classes the 20 best and worst.

    Returns:
        [`~matplotlib.figure.Figure`] or `None`: none without APs of classes.
    """
    models = {name: row["classes"] for name, row in run.models.items() if row.get("classes")}
    if not models:
        return None
    ranking = run.student if run.student in models else list(models)[-1]
    names, title = ranked_classes(models, models[ranking], ranking)
    height = max(0.17 * len(models), 0.25)  # inches of a class
    figure = Figure(figsize=(8.0, height * len(names) * 1.25 + 1.5), layout="constrained")
    ax = figure.subplots()
    for place, name in enumerate(names):
        if all(classes.get(name) is None for classes in models.values()):
            ax.text(0, place, " no objects in the evaluation set", va="center", fontsize=7, color="#666666")
            continue
        for i, (model, classes) in enumerate(models.items()):
            draw_bar(ax, place + (i + 0.5) * 0.8 / len(models) - 0.4, classes.get(name), 0.8 / len(models), model)
    best = max((100 * ap for classes in models.values() for ap in classes.values() if ap is not None), default=0)
    ax.set_xlim(0, max(10.0, 1.12 * best))
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_yticks(range(len(names)), [plain(name) for name in names])
    if len(names) < len([ap for ap in models[ranking].values() if ap is not None]):  # best above, worst below
        ax.axhline(MOST_BARS / 2 - 0.5, color="black", linestyle=":", linewidth=1)
    ax.set_xlabel("AP over IoU 0.50 to 0.95, %", fontsize=9)
    ax.set_ylabel("class", fontsize=9)
    finish(ax, "x")
    head(figure, title, {name: Patch(color=color_of(name)) for name in models})
    return figure


def ranked_classes(
    models: Mapping[str, Mapping[str, float | None]], ranks: Mapping[str, float | None], ranking: str
) -> tuple[list[str], str]:
    """The classes to draw, best first and those without objects last, and what to say of the choice."""
    names = dict.fromkeys(itertools.chain.from_iterable(models.values()))
    known = sorted((name for name in names if ranks.get(name) is not None), key=lambda name: -(ranks[name] or 0.0))
    rest = [name for name in names if ranks.get(name) is None]
    if len(names) <= MOST_BARS:
        return known + rest, "AP by class"
    if len(known) <= MOST_BARS:
        return known, f"AP by class: {len(known)} of {len(names)} classes, those with objects"
    half = MOST_BARS // 2
    title = f"AP by class: the {half} best and {half} worst of {len(names)}, by the AP of {ranking}"
    return known[:half] + known[-half:], title


def draw_bar(ax: Axes, place: float, ap: float | None, height: float, model: str) -> None:
    """A model's AP with its number, which tells none from zero."""
    if ap is None:
        ax.text(0, place, " not measured", va="center", fontsize=6, color="#666666")
        return
    ax.barh(place, 100 * ap, height=0.92 * height, color=color_of(model), label=model)
    ax.text(100 * ap, place, f" {100 * ap:.1f}", va="center", fontsize=6)


def draw_precision(run: Run) -> Figure | None:
    """Precision over recall at IoU 0.50 and 0.75: each model's mean over classes, and the student by class.

    Returns:
        [`~matplotlib.figure.Figure`] or `None`: none where no precision was kept.
    """
    levels = [level for level in ("50", "75") if any(curves.get(level) for curves in run.precision.values())]
    if not levels:
        return None
    by_class = {level: run.precision.get(run.student, {}).get(level) or {} for level in levels}
    columns = 2 if any(by_class.values()) else 1
    figure = Figure(figsize=(5.5 * columns, 3.9 * len(levels)), layout="constrained")
    for axes, level in zip(figure.subplots(len(levels), columns, squeeze=False), levels, strict=True):
        draw_models(axes[0], {name: curves[level] for name, curves in run.precision.items() if curves.get(level)})
        fill_curves(axes[0], f"IoU 0.{level}: mean over the classes", "model, mAP in %")
        if columns == 2:
            colors = class_colors(by_class[levels[0]])
            draw_classes(axes[1], by_class[level], colors)
            some = len(colors) < len(by_class[levels[0]])
            heading = f"best and worst at IoU 0.{levels[0]}, AP in %" if some else "class, AP in %"
            fill_curves(axes[1], f"IoU 0.{level}: {run.student}, by class", heading)
    figure.suptitle("Precision over recall", fontsize=11)
    return figure


def draw_models(ax: Axes, models: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """One line for each model: the mean over its classes."""
    for name, classes in models.items():
        curve = [mean(values) for values in zip(*classes.values(), strict=True)]
        style = "--" if name == TEACHER else "-"
        draw_curve(ax, curve, name, color=color_of(name), linestyle=style)


def class_colors(classes: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """The classes that are named, best first, and their colours: of many the four best and the three worst."""
    order = sorted(classes, key=lambda name: -mean(classes[name]))
    named = order if len(order) <= len(CLASS_COLORS) else order[:4] + order[-3:]
    return dict(zip(named, CLASS_COLORS, strict=False))


def draw_classes(ax: Axes, classes: Mapping[str, Sequence[float]], colors: Mapping[str, str]) -> None:
    """One line for each class; those without a colour are grey and behind the others."""
    others = [name for name in classes if name not in colors]
    for name in others:
        draw_curve(ax, classes[name], UNNAMED, color=GREY, linewidth=0.6)
    for name, color in colors.items():
        if name in classes:
            draw_curve(ax, classes[name], plain(name), color=color)
    if others:
        ax.plot([], [], color=GREY, linewidth=0.6, label=f"{len(others)} other classes")


def draw_curve(
    ax: Axes, curve: Sequence[float], label: str, color: str, linestyle: str = "-", linewidth: float = 1.5
) -> None:
    """Precision at evenly spaced recalls, both in percent, with its mean, the average precision, in the label."""
    recalls = [100 * i / (len(curve) - 1) for i in range(len(curve))]
    label = label if label == UNNAMED else f"{label}, {100 * mean(curve):.1f}"
    ax.plot(
        recalls, [100 * value for value in curve], label=label, color=color, linestyle=linestyle, linewidth=linewidth
    )


def fill_curves(ax: Axes, title: str, heading: str) -> None:
    lines = [line for line in ax.get_lines() if line.get_label() != UNNAMED]
    labels = [str(line.get_label()) for line in lines]  # given, since a name that begins with _ would be left out
    beside = (1.0, 1.0)  # the chart, on no line
    ax.legend(
        lines,
        labels,
        title=heading,
        fontsize=8,
        title_fontsize=8,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=beside,
    )
    ax.set(xlim=(0, 100), ylim=(-2, 103))  # lines at 0 and 100 stay visible
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("recall, %", fontsize=8)
    ax.set_ylabel("precision, %", fontsize=8)
    finish(ax)


def head(figure: Figure, title: str, handles: Mapping[str, Artist]) -> None:
    """Title and models over all charts. It is one legend, since a second one or a title would lie on it."""
    figure.legend(
        list(handles.values()),
        list(handles),
        title=title,
        title_fontsize=11,
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
    )


def finish(ax: Axes, grid: Literal["both", "x"] = "both") -> None:
    """What all charts share: thin grid lines behind the data, and no box around it."""
    ax.grid(True, axis=grid, linewidth=0.5, alpha=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def color_of(model: str) -> str:
    return MODEL_COLORS.get(model, "#009E73")


def plain(name: str, most: int = 32) -> str:
    """A class name as a label: on one line, cut where it is very long, and a dollar begins no formula."""
    line = " ".join(name.split())
    return (line if len(line) <= most else f"{line[: most - 1]}…").replace("$", r"\$")


PLOTS: dict[str, Callable[[Run], Figure | None]] = {
    "curves.png": draw_curves,
    "per_class.png": draw_per_class,
    "pr_curves.png": draw_precision,
}
