"""`benchmark.py methods`: the gain of every method over its controls, and its cost."""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import yaml
from tqdm import tqdm

from ...distillation import distiller as distiller_module
from ...distillation.stored_teacher import StoredTeacher
from ...distillation.teacher import Teacher
from ...training.trainer import DistillationTrainer
from ..answer import answer_if_auto
from ..arguments import parse, read_recipe
from ..run_setup import build_trainer, load_splits
from .series import run_series


PARTS = ("reading", "teacher", "decoder passes", "losses")


# --- cost ------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds by the name of a part; on a GPU every part waits for the device to include all its own work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = now()
        try:
            yield
        finally:
            self.seconds[name] += now() - started

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def cost_of(arguments: list[str], steps: int) -> dict[str, float]:
    """Median seconds of a training step (reading, forward, backward, optimizer) and of its parts, and seconds of the
    stored answers of an image in all its views."""
    given = parse(arguments)
    splits = load_splits(given)
    answering = answer_if_auto(given, splits)
    trainer = build_trainer(given, splits)
    trainer.create_optimizer()
    seen = [one_step(trainer) for _ in range(steps + 2)][2:]  # the first two are the warm-up
    found = {name: statistics.median(step[name] for step in seen) for name in ("step", *PARTS)}
    views = 1 if given.config.answers_form == "moved" else given.config.augmentation_views or 0
    return found | {"answers": answering * views}


def one_step(trainer: DistillationTrainer) -> dict[str, float]:
    """Seconds of one step and its parts. The images are read in this process, as without `dataloader_num_workers`."""
    distiller, clock = trainer.distiller.train(), Clock()
    patches = [
        mock.patch.object(kind, "of", clock.timed("teacher", cast(Any, kind).of)) for kind in (Teacher, StoredTeacher)
    ]
    patches += [
        mock.patch.object(
            distiller_module,
            "decode_requests",
            clock.timed("decoder passes", distiller_module.decode_requests),
        ),
    ]
    patches += [
        mock.patch.object(method, name, clock.timed("losses", getattr(method, name)))
        for method in distiller.methods.values()
        for name in ("costs", "losses")
    ]
    for patch in patches:
        patch.start()
    try:
        with clock.part("step"):
            with clock.part("reading"):
                data: Any = trainer.train_dataset
                items = [data[place] for place in range(trainer.args.per_device_train_batch_size)]
                batch = trainer._prepare_inputs(trainer.data_collator(items))
            trainer.optimizer.zero_grad()
            with trainer.accelerator.autocast():
                loss = distiller(batch)["loss"]
            loss.backward()
            trainer.optimizer.step()
    finally:
        for patch in patches:
            patch.stop()
    return {name: clock.seconds[name] for name in ("step", *PARTS)}


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


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error


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


def costs_of(
    chosen: dict[str, dict[str, Any]], common: dict[str, Any], given: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """The cost of every run, cached in the output folder, so that a continued series keeps its time budget."""
    file = Path(given.output_dir, "costs.json")
    costs = json.loads(file.read_text()) if file.is_file() else {}
    for name in tqdm([name for name in chosen if name not in costs], desc="costs", leave=False):
        few = {"max_train_samples": 64, "max_eval_samples": 8, "output_dir": f"{given.output_dir}/costs/{name}"}
        costs[name] = cost_of(words_of(common | few | chosen[name]), given.cost_steps)
        if costs[name]["answers"]:
            images = len(load_splits(parse(words_of(common | chosen[name]))).all_train)
            costs[name]["answers"] *= images  # of which the cost was measured on a few
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(costs, indent=2))
    return {name: costs[name] for name in chosen}


def methods(given: argparse.Namespace) -> dict[str, Any]:
    """Prints the tables and returns their figures."""
    series = yaml.safe_load(Path(given.variants).read_text())
    chosen = {n: v or {} for n, v in series["variants"].items() if not given.only or n in given.only}
    common = {"config": series["recipe"], "output_dir": given.output_dir} | (series.get("arguments") or {})
    costs = costs_of(chosen, common, given)
    print(cost_table(costs))
    if given.only_cost:
        return {"costs": costs}
    recipe = read_recipe(series["recipe"])
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
