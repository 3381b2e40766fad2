"""What all pictures of a run share: colours, legend, grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..run_folder import CONTROL


TEACHER = "teacher"
# Okabe and Ito's colours: kinds of colour blindness tell them apart.
MODEL_COLORS = {TEACHER: "#444444", CONTROL: "#E69F00", "distilled": "#0072B2", "student": "#0072B2"}


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


def color_of(model: str) -> str:
    return MODEL_COLORS.get(model, "#009E73")


def plain(name: str, most: int = 32) -> str:
    """A class name as a label: on one line, cut where it is very long, and a dollar begins no formula."""
    line = " ".join(name.split())
    return (line if len(line) <= most else f"{line[: most - 1]}…").replace("$", r"\$")
