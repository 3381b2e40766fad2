"""Trainer callbacks: the data set's epoch, the EMA update, and the best checkpoint of a resumed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import ConcatDataset, Subset
from transformers import TrainerCallback

from .ema import StudentAverage


@runtime_checkable
class SeesEpochs(Protocol):
    """A data set whose items change from epoch to epoch."""

    def set_epoch(self, epoch: int) -> None: ...


class DatasetEpochCallback(TrainerCallback):
    """Calls `set_epoch` on the training set, so that its augmentation changes with the epoch and survives a resume."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        set_epoch(train_dataloader.dataset, int(state.epoch or 0))


def set_epoch(dataset: Any, epoch: int) -> None:
    """Sets the epoch of a data set, or of those inside it (`ConcatDataset`, `Subset`)."""
    if isinstance(dataset, SeesEpochs):
        dataset.set_epoch(epoch)
    elif isinstance(dataset, ConcatDataset):
        for one in dataset.datasets:
            set_epoch(one, epoch)
    elif isinstance(dataset, Subset):
        set_epoch(dataset.dataset, epoch)


class AttemptCallback(TrainerCallback):
    """Calls a function when a training begins, also when `auto_find_batch_size` begins again.

    Args:
        begin (`Callable[[], None]`)
    """

    def __init__(self, begin: Callable[[], None]):
        self.begin = begin

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin()


class BestCheckpointCallback(TrainerCallback):
    """Finds the best checkpoint of a resumed run by its step, since saved states hold no absolute paths."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_model_checkpoint is None and best.is_dir():
            state.best_model_checkpoint = str(best)


class AverageCallback(TrainerCallback):
    """Updates the student's moving average after each optimizer step.

    Args:
        average ([`StudentAverage`])
    """

    def __init__(self, average: StudentAverage):
        self.average = average

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update()
