"""The benchmark's two sides compute the same, on a small case; its times are for reading, not for testing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hf_detrkd.adapters import ADAPTERS


ROOT = Path(__file__).parent.parent


def test_the_losses_of_every_family_are_equal_and_their_times_are_written(tmp_path: Path) -> None:
    sizes = [
        "--batch_size",
        "2",
        "--queries",
        "12",
        "--boxes",
        "4",
        "--layers",
        "2",
        "--classes",
        "5",
        "--groups",
        "3",
        "--denoising",
        "8",
        "--repeats",
        "1",
    ]
    file = tmp_path / "figures.json"
    command = [sys.executable, "scripts/benchmark.py", "criterion", *sizes, "--output_file", str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    figures = json.loads(file.read_text())
    assert figures.keys() == ADAPTERS.keys()
    assert all(row["equal"] and row["ours_ms"] > 0 for row in figures.values())
    for name, row in figures.items():
        assert (row["right_loss"] != row["transformers_loss"]) == (name in ("d_fine", "deimv2"))
        assert f"| {name} |" in result.stdout
