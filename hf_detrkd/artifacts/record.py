"""The record of a run (facts, metrics and precision curves), and the only writer of `run.json`, `summary.json` and
`precision.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..evaluation import class_figures
from .redaction import portable
from .run_folder import FACTS, PRECISION, SUMMARY, Run
from .whole_files import as_json, write_whole


UNKNOWN: tuple[Any, ...] = (None, {})
VERBATIM = ("classes", "papers")  # facts that are public by themselves, and may look like paths or secrets


class Record:
    """Everything that a run publishes about itself: `run.json`, `summary.json` and `precision.json`.

    Each run has one record, to which everything that measures something adds; see [`Run`] for the names. Only
    [`write`] touches files, and only those whose content differs.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.precision: dict[str, Any] = {}

    def add_facts(self, facts: Mapping[str, Any]) -> None:
        """Adds facts of the run; later ones replace earlier ones of the same name."""
        self.facts |= facts

    def add_model(self, name: str, row: Mapping[str, Any], precision: Mapping[str, Any] | None = None) -> None:
        """Adds metrics of a model to its row of the summary; `None` does not replace a known value.

        Args:
            name (`str`): `teacher`, `control`, `distilled` or `student`; a new one becomes the last row.
            row (`dict[str, Any]`): see [`row_of`].
            precision (`dict`, *optional*): precision over recall, as in [`CocoBoxMetric`].
        """
        known = self.models.get(name, {})
        self.models[name] = known | {
            key: value for key, value in row.items() if key not in known or value not in UNKNOWN
        }
        if precision:
            self.precision[name] = precision

    def write(self, folder: str | Path) -> Run:
        """Writes the files into an output folder, without secrets and paths of the machine, and reads the folder."""
        folder = Path(folder)
        verbatim = {name: value for name, value in self.facts.items() if name in VERBATIM}
        texts = {FACTS: as_json(portable(self.facts) | verbatim), SUMMARY: as_json(self.models)}
        if self.precision:
            texts[PRECISION] = json.dumps(self.precision)
        for name, text in texts.items():
            file = folder / name
            if not file.is_file() or file.read_text() != text:
                write_whole(file, text)
        return Run.read(folder)


def row_of(
    model: PreTrainedModel, metrics: Mapping[str, float], seconds_per_step: float | None = None
) -> dict[str, Any]:
    """A model's row of the summary.

    Args:
        model ([`~transformers.PreTrainedModel`])
        metrics (`dict[str, float]`): as in [`CocoBoxMetric`]; missing ones were not measured.
        seconds_per_step (`float`, *optional*): duration of a training step.
    """
    return figures_row(model.config.id2label, model.num_parameters(), metrics, seconds_per_step)


def figures_row(
    id2label: Mapping[int, str],
    parameters: int | None,
    metrics: Mapping[str, float],
    seconds_per_step: float | None = None,
) -> dict[str, Any]:
    """A row of the summary, see [`row_of`].

    Args:
        id2label (`dict[int, str]`): the classes of the metrics.
        parameters (`int`, *optional*): size of the model.
        metrics (`dict[str, float]`), seconds_per_step (`float`, *optional*): as in [`row_of`].
    """
    classes = {id2label[number]: key for number, key in class_figures(dict(id2label)).items()}
    found = {name: metrics[key] for name, key in classes.items() if key in metrics}
    return {
        **{key: metrics.get(key) for key in ("map", "map_50", "map_75")},
        "parameters": parameters,
        "seconds_per_step": seconds_per_step,
        "classes": {name: value if value >= 0 else None for name, value in found.items()},
    }
