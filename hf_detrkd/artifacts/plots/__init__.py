"""Plots of a run: losses and mAP over the steps, AP by class, precision over recall.

Each `draw_*` returns a [`~matplotlib.figure.Figure`], or `None` if the run's files hold no data for it. A model has
the same colour in all of them; AP, precision and recall are in percent.
"""

from __future__ import annotations

from pathlib import Path

from ..run_folder import Run


DPI = 150


def write_plots(run: Run) -> list[Path]:
    """Draws all plots that the run's files allow into its folder: `curves.png`, `per_class.png`, `pr_curves.png`.

    Args:
        run ([`~hf_detrkd.artifacts.run_folder.Run`])

    Returns:
        `list[Path]`: the image files; plots without data are skipped.
    """
    from .curves import draw_curves  # loads matplotlib
    from .per_class import draw_per_class
    from .precision import draw_precision

    drawn = {
        "curves.png": draw_curves(run),
        "per_class.png": draw_per_class(run),
        "pr_curves.png": draw_precision(run),
    }
    files = []
    for name, figure in drawn.items():
        if figure is not None:
            files.append(run.folder / name)
            figure.savefig(files[-1], dpi=DPI)
    return files
