"""Style shared by all plots of a run: colours, legend, grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..run_folder import CONTROL


TEACHER = "teacher"
# Okabe and Ito's palette, which colour-blind readers can distinguish.
MODEL_COLORS = {TEACHER: "#444444", CONTROL: "#E69F00", "distilled": "#0072B2", "student": "#0072B2"}


def head(figure: Figure, title: str, handles: Mapping[str, Artist]) -> None:
    """Title and models above all axes, as one legend, since a separate title would overlap it."""
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
    """Thin grid lines under the data, and no box around it."""
    ax.grid(True, axis=grid, linewidth=0.5, alpha=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)


def color_of(model: str) -> str:
    return MODEL_COLORS.get(model, "#009E73")


def plain(name: str, most: int = 32) -> str:
    """A class name as a label: on one line, truncated to `most` characters, and with dollar signs escaped."""
    line = " ".join(name.split())
    return (line if len(line) <= most else f"{line[: most - 1]}…").replace("$", r"\$")
