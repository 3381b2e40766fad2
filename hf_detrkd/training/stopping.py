"""Stops a run in good order: a first SIGTERM or Ctrl-C saves a checkpoint at the next step, a second ends at once."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..artifacts.redaction import under_home
from .run_stopped import RunStopped


SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOP_AT = "hf_detrkd/stop_at"  # in the processes' common store: the step after which all stop
TRAININGS = itertools.count()  # of this process: each has a key of its own in the store
AHEAD = 2  # steps: a process is at most one step ahead of another


class StopOnSignal(TrainerCallback):
    """Saves and ends the training after the step in which SIGTERM or SIGINT comes, in all processes after the same.

    Attributes:
        number (`int`, *optional*): the signal that stopped the run.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}
        self._key = STOP_AT
        self._asked = self._stops = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.number, self._asked, self._stops = None, False, False
        self._key = f"{STOP_AT}/{next(TRAININGS)}"
        # A second attempt of auto_find_batch_size begins without an end of the first.
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Gives the signals back to whom they belonged before the training."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for other in SIGNALS:  # a second one ends at once
            signal.signal(other, signal.SIG_DFL if other == signal.SIGTERM else signal.default_int_handler)
        os.write(2, b"\nStopping after this step; a checkpoint is saved first. Once more ends at once.\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stops = self._is_due(state.global_step)
        if self._stops:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the training where it would evaluate, or load and delete checkpoints.

        Raises:
            RunStopped: the run stopped in this epoch.
        """
        if self._stops:
            checkpoint = f"{under_home(args.output_dir)}/{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            raise RunStopped(self.number or 0, checkpoint, state.max_steps)

    def _is_due(self, step: int) -> bool:
        """True if the run stops after this step; the processes agree on it by their store, without the device."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self.number is not None
        store = dist.distributed_c10d._get_default_store()
        if self.number is not None and not self._asked:
            self._asked = True
            if not store.check([self._key]):
                store.set(self._key, f"{step + AHEAD},{self.number}")
        if not store.check([self._key]):
            return False
        last, number = map(int, store.get(self._key).decode().split(","))
        self.number = number
        return step >= last
