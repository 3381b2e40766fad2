"""Exponential moving average (EMA) of the student's weights, which is evaluated, saved and pushed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


AVERAGED_STATE = "trained_student.safetensors"  # the trained weights of a checkpoint whose student is the average
UPDATES = "averaging.updates"


class StudentAverage:
    """`average = d * average + (1 - d) * student` after every optimizer step.

    After n steps `d` is `min(decay, (1 + n) / (10 + n))`, so that the first weights are soon forgotten.
    Buffers (BatchNorm's statistics) are the student's.

    Args:
        student (`torch.nn.Module`): on its device.
        decay (`float`): in (0, 1).
    """

    def __init__(self, student: nn.Module, decay: float):
        self.student, self.decay = student, decay
        self.updates = 0
        self.averaged = AveragedModel(student, multi_avg_fn=cast(Any, self._average))

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def update(self) -> None:
        """Takes in the student after an optimizer step."""
        self.updates += 1
        self.averaged.update_parameters(self.student)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the student has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for own, averaged in zip(_tensors(self.student), _tensors(self.averaged.module), strict=True):
            kept = own.clone()
            own.copy_(averaged)
            averaged.copy_(kept)

    def adopt(self) -> None:
        """Gives the student the averaged weights for good."""
        _copy(self.averaged.module, self.student)

    def restart(self) -> None:
        """Makes the average equal to the student."""
        _copy(self.student, self.averaged.module)

    def save(self, folder: Path) -> None:
        """Writes what a resumed run needs beside the average: the trained weights and the number of steps."""
        state = {name: value.contiguous().clone() for name, value in self.student.state_dict().items()}
        save_file(state | {UPDATES: torch.tensor(self.updates)}, folder / AVERAGED_STATE)

    def load(self, folder: Path) -> None:
        """Continues from a checkpoint, whose average the student holds.

        Raises:
            ValueError: the checkpoint was saved without an average.
        """
        file = folder / AVERAGED_STATE
        if not file.is_file():
            raise ValueError(
                f"{folder.parent} was saved without --ema_decay: resume without it, or start from it with "
                "--model_name_or_path."
            )
        self.restart()
        state = load_file(file)
        self.updates = int(state.pop(UPDATES))
        self.averaged.n_averaged.fill_(self.updates)
        self.student.load_state_dict(state)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Every parameter and buffer once, tied ones too."""
    return [*module.parameters(), *module.buffers()]


@torch.no_grad()
def _copy(source: nn.Module, goal: nn.Module) -> None:
    for wanted, value in zip(_tensors(goal), _tensors(source), strict=True):
        wanted.copy_(value)
