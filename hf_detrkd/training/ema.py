"""Exponential moving average (EMA) of the student's weights, which is evaluated, saved and pushed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


AVERAGED_STATE = "trained_student.safetensors"  # the trained weights of a checkpoint whose student is the average
UPDATES = "averaging.updates"


class StudentAverage:
    """`average = d * average + (1 - d) * student` after every optimizer step.

    After n steps `d` is `min(decay, (1 + n) / (10 + n))`, so that the first weights are soon forgotten.
    Buffers (BatchNorm's statistics) are the student's. If FSDP shards the student, each process averages its shards.

    Args:
        student (`torch.nn.Module`)
        decay (`float`): in (0, 1).
        root (`torch.nn.Module`, *optional*): holds the student, and is what FSDP shards. Default: the student.
    """

    def __init__(self, student: nn.Module, decay: float, root: nn.Module | None = None):
        self.student, self.decay, self.root = student, decay, root or student
        self.updates = 0
        self._averaged: list[Tensor] | None = None  # None: equal to the student

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the student after an optimizer step."""
        self.updates += 1
        current = self._tensors()
        if self._averaged is None:
            self._averaged = [value.clone() for value in current]
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = len(list(self.student.parameters()))
        torch._foreach_lerp_(self._averaged[:parameters], current[:parameters], 1 - decay)
        for averaged, buffer in zip(self._averaged[parameters:], current[parameters:], strict=True):
            averaged.copy_(buffer)

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
        if self._averaged is not None:
            for own, averaged in zip(self._tensors(), self._averaged, strict=True):
                kept = own.clone()
                own.copy_(averaged)
                averaged.copy_(kept)

    def adopt(self) -> None:
        """Gives the student the averaged weights for good."""
        self._swap()
        self._averaged = None

    def restart(self) -> None:
        """Makes the average equal to the student."""
        self._averaged = None

    def _tensors(self) -> list[Tensor]:
        """Every parameter and buffer once, tied ones too; of sharded ones the part of this process."""
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass without a backward pass, they may be whole
        values = [*self.student.parameters(), *self.student.buffers()]
        return [value.to_local() if isinstance(value, DTensor) else value.detach() for value in values]

    def save(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Writes what a resumed run needs beside the average: the student's trained weights, whole, and the steps."""
        state = {name: value.contiguous().clone() for name, value in trained.items()}
        save_file(state | {UPDATES: torch.tensor(self.updates)}, folder / AVERAGED_STATE)

    @torch.no_grad()
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
        state = load_file(file)
        self.updates = int(state.pop(UPDATES))
        self._averaged = [value.clone() for value in self._tensors()]
        load_whole(self.student, state)


def load_whole(module: nn.Module, weights: dict[str, Any]) -> None:
    """Loads all weights of a module, which may be sharded (FSDP2): each process takes its part of them."""
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        module.load_state_dict(weights)
        return
    set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))
