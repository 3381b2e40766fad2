"""One readable line for each log of a training. Trackers and `trainer_state.json` get every value."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState


class LogLines:
    """Writes the lines of a run; it knows when the run began, and its best mAP so far."""

    def __init__(self) -> None:
        self.began, self.first = time.perf_counter(), 0
        self.best: dict[str, tuple[float, int]] = {}  # mAP and step, by the name of the evaluated set

    def begin(self, state: TrainerState) -> None:
        self.began, self.first = time.perf_counter(), state.global_step

    def line(self, logs: Mapping[str, Any], state: TrainerState) -> str:
        """The line of a log: losses, metrics, or the end of the training."""
        place = f"step {state.global_step}/{state.max_steps}"
        if "train_runtime" in logs:
            return (
                f"{state.global_step} steps in {duration(logs['train_runtime'])}, mean loss {logs['train_loss']:.4g}"
            )
        if "loss" in logs:
            return f"{place}  {self._training(logs, state)}"
        if any(name.endswith("_map") for name in logs):
            sets = [name.removesuffix("_map") for name in logs if name.endswith("_map")]
            return f"{place}  " + "  ".join(self._evaluation(name, logs, state.global_step) for name in sets)
        return f"{place}  " + "  ".join(f"{name} {_number(value)}" for name, value in logs.items() if name != "epoch")

    def _training(self, logs: Mapping[str, Any], state: TrainerState) -> str:
        parts = [f"loss {logs['loss']:.4g}"]
        share = 1 - logs.get("task_loss", logs["loss"]) / (logs["loss"] or 1.0)
        if share > 0.005:
            parts.append(f"distillation {100 * share:.0f} %")
        if "learning_rate" in logs:
            parts.append(f"lr {logs['learning_rate']:.2g}")
        if "images_per_second" in logs:
            parts.append(f"{logs['images_per_second']:.3g} images/s")
        steps = state.global_step - self.first
        if steps > 0:
            left = (state.max_steps - state.global_step) * (time.perf_counter() - self.began) / steps
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def _evaluation(self, name: str, logs: Mapping[str, Any], step: int) -> str:
        """mAP and mAP50 of a set in percent, its loss, and where it was better."""
        found = logs[f"{name}_map"]
        figures = [f"mAP {100 * found:.1f}"]
        if f"{name}_map_50" in logs:
            figures.append(f"mAP50 {100 * logs[f'{name}_map_50']:.1f}")
        if f"{name}_loss" in logs:
            figures.append(f"loss {logs[f'{name}_loss']:.4g}")
        best, place = self.best.get(name, (found, step))
        self.best[name] = max((found, step), (best, place), key=lambda one: one[0])
        better = f" (best: {100 * best:.1f} at step {place})" if best > found else ""
        return f"{name}: {', '.join(figures)}{better}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Seconds in words of two units at most, such as `2 h 5 min`."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class ProgressLines(ProgressCallback):
    """A progress bar with readable lines above it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = LogLines()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.lines.begin(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(self.lines.line(logs, state))


class PrintedLines(PrinterCallback):
    """Readable lines without a progress bar."""

    def __init__(self) -> None:
        self.lines = LogLines()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.lines.begin(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            print(self.lines.line(logs, state), flush=True)


def with_readable_lines(trainer: Trainer) -> None:
    """Takes the place of transformers' own output of logs, which are dicts; that of notebooks, a table, stays."""
    for given, ours in ((ProgressCallback, ProgressLines), (PrinterCallback, PrintedLines)):
        if any(type(callback) is given for callback in trainer.callback_handler.callbacks):
            trainer.pop_callback(given)
            trainer.add_callback(ours)
