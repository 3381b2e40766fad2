"""What the training tells its parts at each step and epoch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from transformers import TrainerCallback


if TYPE_CHECKING:
    from .trainer import DistillationTrainer


@runtime_checkable
class SeesEpochs(Protocol):
    """A data set whose items change from epoch to epoch."""

    def set_epoch(self, epoch: int) -> None: ...


class StepCallback(TrainerCallback):
    """Tells the training set the epoch, so that its augmentation changes from epoch to epoch and survives a resume,
    the average of the student that there was a step, and a resumed run where its best checkpoint is."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_model_checkpoint is None and best.is_dir():  # a resumed run
            state.best_model_checkpoint = str(best)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        dataset = train_dataloader.dataset
        if isinstance(dataset, SeesEpochs):
            dataset.set_epoch(int(state.epoch or 0))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._average is not None:
            self.trainer._average.update()
