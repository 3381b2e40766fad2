"""Runs a recipe in several variants and seeds, and writes a table of means and standard errors.

    python scripts/ablate.py --variants scripts/recipes/ablation.yaml --seeds 0 1 2 --jobs 2 --output_dir outputs/abl

The variants file holds `recipe:` (a recipe of scripts/distill.py), `arguments:` (common to all runs) and `variants:`
(a name and its arguments each); `null` takes an argument of the recipe away. Arguments that are not this script's own
are passed to all runs. Runs with results are not repeated, so that an interrupted series can be continued.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ...artifacts.run_folder import RESULTS
from ..arguments import read_recipe


MODULE = "hf_detrkd.cli.distill"
VARIANT = "variant.yaml"
OWN = {"config", "output_dir", "seed"}  # arguments that a series sets


def write_variant(recipe: str, arguments: dict[str, object], folder: Path) -> Path:
    """The recipe of one run in its folder: that of the series with other arguments, without those that are nothing.

    Raises:
        ValueError: an argument that the series sets itself, or results of other arguments in the folder.
    """
    own = sorted(OWN & arguments.keys())
    if own:
        raise ValueError(f"The series sets {own[0]} of its runs itself: take it out of the arguments and variants.")
    file = folder / VARIANT
    merged = read_recipe(recipe) | arguments
    given = {name: value for name, value in merged.items() if value is not None}
    if file.is_file() and has_results(folder):
        stored = yaml.safe_load(file.read_text())
        for name in sorted(stored.keys() | given.keys()):
            if stored.get(name) != given.get(name):
                raise ValueError(
                    f"{folder} holds the results of another run: its {name} is {stored.get(name)}, and here "
                    f"{given.get(name)}. Choose another --output_dir, or delete that folder."
                )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(given))
    return file


def has_results(folder: Path) -> bool:
    return (folder / RESULTS).is_file()


def command_of(recipe: Path, folder: Path, seed: int) -> list[str]:
    """The command line of one run."""
    return [
        *(sys.executable, "-m", MODULE, "--config", str(recipe)),
        *("--output_dir", str(folder), "--seed", str(seed)),
    ]


def as_arguments(words: list[str]) -> dict[str, object]:
    """`--name value` pairs by name; a name without a value is a switch."""
    found: dict[str, object] = {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            value = words[place + 1] if place + 1 < len(words) else "--"
            found[word[2:]] = True if value.startswith("--") else value
        elif not place or not words[place - 1].startswith("--"):
            raise ValueError(f"Further arguments must be pairs `--name value`, got {word!r} by itself.")
    return found


def run(command: list[str], folder: Path) -> None:
    """Starts one run, with its output in `log.txt` in its folder; does nothing if it has results."""
    if has_results(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with open(folder / "log.txt", "w") as log:
        result = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}: see {folder / 'log.txt'}.")


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean and standard error over seeds, as Markdown."""
    lines = ["| run | mAP | mAP50 | s / step |", "|---|---|---|---|"]
    for name, runs in results.items():
        cells = []
        for key, scale, digits in (("eval_map", 100, 1), ("eval_map_50", 100, 1), ("train_seconds_per_step", 1, 2)):
            mean, error = mean_and_error([scale * figures[key] for figures in runs])
            cells.append(f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(runs) > 1 else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run_series(
    series: dict[str, Any], seeds: list[int], jobs: int, output_dir: Path
) -> dict[str, list[dict[str, float]]]:
    """Runs all variants with all seeds; returns the results of each variant by seed."""
    # Latencies of models that share the machine would be meaningless.
    common = {"measure_efficiency": False} | (series.get("arguments") or {})
    folders = {name: [output_dir / name / str(seed) for seed in seeds] for name in series["variants"]}
    with ThreadPoolExecutor(jobs) as pool:
        runs = []
        for place, seed in enumerate(seeds):  # seed by seed, so that early results cover all variants
            for name, arguments in series["variants"].items():
                folder = folders[name][place]
                recipe = write_variant(series["recipe"], common | (arguments or {}), folder)
                runs.append(pool.submit(run, command_of(recipe, folder, seed), folder))
        for future in tqdm(runs, desc="runs"):
            future.result()
    return {n: [json.loads((f / RESULTS).read_text()) for f in paths] for n, paths in folders.items()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", required=True, help="YAML file with recipe, arguments and variants.")
    parser.add_argument("--only", nargs="*", help="Names of the variants to run. Default: all.")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of the runs of each variant. Default: 0 1 2."
    )
    parser.add_argument("--jobs", type=int, default=1, help="Number of parallel runs. Default: 1.")
    parser.add_argument("--output_dir", required=True, help="Output folder; runs with results in it are not repeated.")
    given, further = parser.parse_known_args(argv)
    series = yaml.safe_load(Path(given.variants).read_text())
    series["variants"] = {n: v for n, v in series["variants"].items() if not given.only or n in given.only}
    series["arguments"] = (series.get("arguments") or {}) | as_arguments(further)
    text = table(run_series(series, given.seeds, given.jobs, Path(given.output_dir)))
    Path(given.output_dir, "table.md").write_text(text + "\n")
    print(text)
