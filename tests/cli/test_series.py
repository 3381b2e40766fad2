"""`scripts/ablate.py`: which runs a series is made of, and what its table says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from hf_detrkd.cli.benchmark import series as ablate


def test_further_arguments_are_pairs_and_switches() -> None:
    words = ["--dataset_name", "folder", "--bf16", "--seed_of", "3", "--tf32"]
    assert ablate.as_arguments(words) == {"dataset_name": "folder", "bf16": True, "seed_of": "3", "tf32": True}
    assert ablate.as_arguments([]) == {}
    with pytest.raises(ValueError, match="got 'folder' by itself"):
        ablate.as_arguments(["folder"])
    with pytest.raises(ValueError, match="got 'more' by itself"):
        ablate.as_arguments(["--freeze", "a", "more"])


def test_runs_that_are_done_are_not_run_again_and_the_table_holds_mean_and_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def pretend(command: list[str], **_: object) -> object:
        commands.append(command)
        folder, seed = Path(command[command.index("--output_dir") + 1]), int(command[command.index("--seed") + 1])
        figures = {"eval_map": 0.1 * (seed + 1), "eval_map_50": 0.5, "train_seconds_per_step": 0.25}
        (folder / "all_results.json").write_text(json.dumps(figures))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(ablate.subprocess, "run", pretend)
    (tmp_path / "r.yaml").write_text("method: kd_detr\ngeneral_points: 30\n")
    variants = {"a": {"method": "none", "general_points": None}, "b": None}
    series = {"recipe": str(tmp_path / "r.yaml"), "arguments": {"max_steps": 5}, "variants": variants}
    results = ablate.run_series(series, [0, 1], 1, tmp_path)
    assert [command[command.index("--output_dir") + 1] for command in commands] == [
        str(tmp_path / name / seed) for seed in "01" for name in "ab"
    ]
    recipes = [yaml.safe_load(Path(command[command.index("--config") + 1]).read_text()) for command in commands[:2]]
    common = {"max_steps": 5, "measure_efficiency": False}
    assert recipes == [{"method": "none", **common}, {"method": "kd_detr", "general_points": 30, **common}]
    assert "| a | 15.0 ± 5.0 | 50.0 ± 0.0 | 0.25 ± 0.00 |" in ablate.table(results)
    ablate.run_series(series, [0, 1, 2], 1, tmp_path)
    assert len(commands) == 6
    series["arguments"]["max_steps"] = 7
    with pytest.raises(ValueError, match=r"a/0 holds the results of another run: its max_steps is 5, and here 7\."):
        ablate.run_series(series, [0], 1, tmp_path)
    series["arguments"] = {"seed": 3}
    with pytest.raises(ValueError, match="The series sets seed of its runs itself"):
        ablate.run_series(series, [0], 1, tmp_path / "new")


def test_a_run_that_fails_says_where_its_log_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with 3: see .*log\.txt"):
        ablate.run([sys.executable, "-c", "print('why'); raise SystemExit(3)"], tmp_path / "run")
    assert (tmp_path / "run" / "log.txt").read_text() == "why\n"
