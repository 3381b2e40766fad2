"""The notebook runs from top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from PIL import Image

from tests import ROOT


NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
SMALL = "MAX_STEPS, TRAIN_IMAGES, EVAL_IMAGES, MEASURE_LATENCY = 2, 8, 4, False"


def test_the_notebook_is_valid_and_holds_no_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    install, *cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert install.source == "%pip install --quiet hf-detrkd"
    names: dict[str, Any] = {}
    for cell in cells:
        exec(cell.source, names)
        if "parameters" in cell.metadata.get("tags", ()):
            exec(SMALL, names)
    assert names["trainer"].state.global_step == names["MAX_STEPS"] == 2 and names["scores"]["teacher"] > 0.05
    folder = tmp_path / names["OUTPUT_DIR"] / "student"
    assert {"model.safetensors", "README.md", "report.html"} <= {file.name for file in folder.iterdir()}
    assert Image.open(folder / "predictions.png").width > 600
