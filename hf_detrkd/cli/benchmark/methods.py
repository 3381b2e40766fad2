"""`benchmark.py methods`: the gain of every method over its controls, and its cost."""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ..arguments import parse, read_recipe
from ..run_setup import load_splits
from .series import mean_and_error, run_series
from .step_cost import PARTS, cost_of


FEW = {"max_train_samples": 64, "max_eval_samples": 8}  # images that are enough for the cost of a step


def cost_table(costs: dict[str, dict[str, float]]) -> str:
    """Shares of a step; the rest, after the control's step, is the backward pass of the method's additions."""
    control = next(iter(costs.values()))["step"]
    lines = [
        "| run | s / step | / control | reading | teacher | decoder passes | losses | their backward | answering |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    own = next(iter(costs.values()))["reading"]
    for name, cost in costs.items():
        step = cost["step"]
        rest = max(0.0, step - control - sum(cost[part] for part in PARTS) + own)
        shares = [f"{100 * value / step:.0f} %" for value in (*(cost[part] for part in PARTS), rest)]
        once = f"{cost['answers']:.0f} s" if cost["answers"] else ""
        lines.append(f"| {name} | {step:.3f} | {step / control:.2f} | {' | '.join(shares)} | {once} |")
    return "\n".join(lines)


# --- gain ------------------------------------------------------------------------------------------------------------


def steps_for(seconds: float, cost: dict[str, float]) -> int:
    """Number of steps in a time budget, from which the time of the stored answers is taken."""
    return max(1, round((seconds - cost["answers"]) / cost["step"]))


def gain_table(results: dict[str, list[dict[str, float]]], steps: dict[str, int]) -> str:
    """mAP with its standard error, and the gain over the first run in points and in standard errors."""
    lines = ["| run | steps | mAP | mAP50 | gain | in standard errors |", "|---|---|---|---|---|---|"]
    first: tuple[float, float] | None = None
    for name, runs in results.items():
        figures = [mean_and_error([100 * run[key] for run in runs]) for key in ("eval_map", "eval_map_50")]
        cells = [f"{mean:.1f} ± {error:.1f}" for mean, error in figures]
        (mean, error), gain = figures[0], ["", ""]
        if first is None:
            first = mean, error
        else:
            difference, both = mean - first[0], (error**2 + first[1] ** 2) ** 0.5
            gain = [f"{difference:+.1f} ± {both:.1f}", f"{difference / both:.1f}" if both else ""]
        lines.append(f"| {name} | {steps[name]} | {' | '.join([*cells, *gain])} |")
    return "\n".join(lines)


def words_of(arguments: dict[str, Any]) -> list[str]:
    """Arguments as on the command line."""
    return [f"--{name}={json.dumps(v) if isinstance(v, dict | bool) else v}" for name, v in arguments.items()]


def chosen_variants(
    given: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
    """The series of a file, the arguments of the variants that were asked for, and those that all share."""
    series = yaml.safe_load(Path(given.variants).read_text())
    chosen = {n: v or {} for n, v in series["variants"].items() if not given.only or n in given.only}
    return (
        series,
        chosen,
        {"config": series["recipe"], "output_dir": given.output_dir} | (series.get("arguments") or {}),
    )


def costs_of(
    chosen: dict[str, dict[str, Any]], common: dict[str, Any], given: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """The cost of every run, cached in the output folder, so that a continued series keeps its time budget."""
    file = Path(given.output_dir, "costs.json")
    costs = json.loads(file.read_text()) if file.is_file() else {}
    for name in tqdm([name for name in chosen if name not in costs], desc="costs", leave=False):
        few = {"output_dir": f"{given.output_dir}/costs/{name}"} | FEW
        costs[name] = cost_of(words_of(common | few | chosen[name]), given.cost_steps)
        if costs[name]["answers"]:
            images = len(load_splits(parse(words_of(common | chosen[name]))).all_train)
            costs[name]["answers"] *= images  # of which the cost was measured on a few
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(costs, indent=2))
    return {name: costs[name] for name in chosen}


def methods(given: argparse.Namespace) -> dict[str, Any]:
    """Prints the tables and returns their figures."""
    series, chosen, common = chosen_variants(given)
    costs = costs_of(chosen, common, given)
    print(cost_table(costs))
    if given.only_cost:
        return {"costs": costs}
    recipe: dict[str, Any] = read_recipe(series["recipe"])
    steps = {name: int((recipe | common | arguments)["max_steps"]) for name, arguments in chosen.items()}
    budget = max(costs[name]["answers"] + steps[name] * costs[name]["step"] for name in chosen)
    paid = {name: steps_for(budget, costs[name]) for name in chosen}
    folder = Path(given.output_dir)
    found: dict[str, Any] = {"costs": costs, "seconds": budget}
    for title, lengths, place in (("equal steps", steps, folder), ("equal seconds", paid, folder / "equal_seconds")):
        variants = {name: arguments | {"max_steps": lengths[name]} for name, arguments in chosen.items()}
        found[title] = run_series(series | {"variants": variants}, given.seeds, given.jobs, place)
        print(f"\nAt {title}:\n{gain_table(found[title], lengths)}")
    return found
