"""One training step of a benchmark, in its parts, and its cost in seconds."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from ...distillation import distiller as distiller_module
from ...distillation.stored_teacher import StoredTeacher
from ...distillation.teacher import Teacher
from ...training.trainer import DistillationTrainer
from ..answer import answer_if_auto
from ..arguments import parse
from ..run_setup import build_trainer, load_splits


PARTS = ("reading", "teacher", "decoder passes", "losses")


class Meter(ABC):
    """Measures the parts of a step."""

    @abstractmethod
    def part(self, name: str) -> AbstractContextManager[None]:
        """A context whose work counts for a part."""

    def measured(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call


class Clock(Meter):
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


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def trainer_of(arguments: list[str]) -> tuple[DistillationTrainer, float]:
    """The trainer of a run with its optimizer, and seconds of the stored answers of an image in all its views."""
    given = parse(arguments)
    splits = load_splits(given)
    answering = answer_if_auto(given, splits)
    trainer = build_trainer(given, splits)
    trainer.create_optimizer()
    views = 1 if given.config.answers_form == "moved" else given.config.augmentation_views or 0
    return trainer, answering * views


def cost_of(arguments: list[str], steps: int) -> dict[str, float]:
    """Median seconds of a training step (reading, forward, backward, optimizer) and of its parts, and seconds of the
    stored answers of an image in all its views."""
    trainer, answering = trainer_of(arguments)
    seen: list[dict[str, float]] = []
    for _ in range(steps + 2):
        clock = Clock()
        one_step(trainer, clock)
        seen.append(clock.seconds)
    found = {name: statistics.median(step[name] for step in seen[2:]) for name in ("step", *PARTS)}
    return found | {"answers": answering}


def one_step(trainer: DistillationTrainer, meter: Meter) -> None:
    """One step and its parts. The images are read in this process, as without `dataloader_num_workers`."""
    distiller = trainer.distiller.train()
    places: list[tuple[Any, str, str]] = [(kind, "of", "teacher") for kind in (Teacher, StoredTeacher)]
    places += [(distiller_module, "decode_requests", "decoder passes")]
    places += [(method, name, "losses") for method in distiller.methods.values() for name in ("costs", "losses")]
    with ExitStack() as patches:
        for place, name, part in places:
            function = meter.measured(part, getattr(place, name))
            patches.enter_context(mock.patch.object(place, name, function))
        with meter.part("step"):
            with meter.part("reading"):
                data: Any = trainer.train_dataset
                items = [data[place] for place in range(trainer.args.per_device_train_batch_size)]
                batch = trainer._prepare_inputs(trainer.data_collator(items))
            with trainer.accelerator.autocast():
                loss = distiller(batch)["loss"]
            loss.backward()
            with meter.part("optimizer"):
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
