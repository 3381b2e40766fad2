"""Plot of the AP of every class, with a bar for each model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..run_folder import Run
from .style import color_of, finish, head, plain


MOST_BARS = 40  # classes; of more than this only the best and the worst are drawn


def draw_per_class(run: Run) -> Figure | None:
    """AP of every class and model as bars, the student's best class first; of many classes the 20 best and worst.

    Returns:
        [`~matplotlib.figure.Figure`] or `None`: `None` without APs of classes.
    """
    models = {name: row["classes"] for name, row in run.models.items() if row.get("classes")}
    if not models:
        return None
    ranking = run.student if run.student in models else list(models)[-1]
    names, title = ranked_classes(models, models[ranking], ranking)
    height = max(0.17 * len(models), 0.25)  # inches per class
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
    """The classes to draw, best first and those without objects last, and the plot's title."""
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
    """A model's AP as a bar with its number, or a note if it was not measured."""
    if ap is None:
        ax.text(0, place, " not measured", va="center", fontsize=6, color="#666666")
        return
    ax.barh(place, 100 * ap, height=0.92 * height, color=color_of(model), label=model)
    ax.text(100 * ap, place, f" {100 * ap:.1f}", va="center", fontsize=6)
