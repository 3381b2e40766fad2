"""Plot of precision over recall, for the models and for the student's classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..run_folder import Run, is_teacher
from .style import color_of, finish, plain


CLASS_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
GREY = "#bbbbbb"
UNNAMED = "_nolegend_"  # matplotlib's label for a line without a legend entry


def draw_precision(run: Run) -> Figure | None:
    """Precision over recall at IoU 0.50 and 0.75: each model's mean over classes, and the student by class.

    Returns:
        [`~matplotlib.figure.Figure`] or `None`: `None` if no precision was recorded.
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
        style = "--" if is_teacher(name) else "-"
        draw_curve(ax, curve, name, color=color_of(name), linestyle=style)


def class_colors(classes: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """The classes in the legend, best first, and their colours: of many the four best and the three worst."""
    order = sorted(classes, key=lambda name: -mean(classes[name]))
    named = order if len(order) <= len(CLASS_COLORS) else order[:4] + order[-3:]
    return dict(zip(named, CLASS_COLORS, strict=False))


def draw_classes(ax: Axes, classes: Mapping[str, Sequence[float]], colors: Mapping[str, str]) -> None:
    """One line for each class; those without a colour are grey and drawn under the others."""
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
    labels = [str(line.get_label()) for line in lines]  # explicit, since matplotlib skips names that begin with _
    beside = (1.0, 1.0)  # outside the axes, on no line
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


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
