"""Pictures of a run: its losses and mAP over the steps, AP by class, precision over recall.

Each `draw_*` gives a [`~matplotlib.figure.Figure`], or `None` where the run's files hold nothing for it. A model has
the same colour in all of them; AP, precision and recall are in percent.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from ..run_files import Run
from .curves import draw_curves
from .per_class import draw_per_class
from .precision import draw_precision
from .style import MODEL_COLORS


__all__ = ["MODEL_COLORS", "PLOTS", "draw_curves", "draw_per_class", "draw_precision", "write_plots"]

DPI = 150
PLOTS: dict[str, Callable[[Run], Figure | None]] = {
    "curves.png": draw_curves,
    "per_class.png": draw_per_class,
    "pr_curves.png": draw_precision,
}


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
