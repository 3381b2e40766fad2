"""`--torch_compile`: the pieces of a detector that hold its operations, each by itself.

A whole detector breaks its graph at every step: matching runs on the host, and hooks read what methods compare. The
backbone, the encoder and the decoder's layers have neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..distillation.distiller import Distiller
from ..distillation.teacher import Teacher
from .config import DistillationConfig


PIECES = ("backbone", "encoder")
"""Modules that are compiled as a whole."""


class CompiledForward:
    """The compiled `forward` of a module, in its place: hooks stay outside, and the names of weights as they are. The
    module's copies have their own, which is not compiled."""

    def __init__(self, module: nn.Module, **options: Any):
        self.module = module
        self.run = torch.compile(module.forward, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return MethodType(type(self.module).forward, memo[id(self.module)])


@contextmanager
def compiled(models: Iterable[nn.Module], **options: Any) -> Iterator[None]:
    """Compiles the pieces of detectors, each at its first call; on exit they are as before.

    Args:
        models (`Iterable[torch.nn.Module]`): students and teachers.
        options: of `torch.compile`, such as `backend` and `mode`.
    """
    pieces = {piece: dynamic for model in models for piece, dynamic in pieces_of(model).items()}
    settings = {
        "capture_scalar_outputs": True,  # the checks of sizes in deformable attention
        "skip_nnmodule_hook_guards": False,  # the masks between groups of queries are hooks of the attention
    }
    with torch._dynamo.config.patch(settings):
        try:
            for piece, dynamic in pieces.items():
                piece.forward = CompiledForward(piece, dynamic=dynamic, **options)
            yield
        finally:
            for piece in pieces:
                vars(piece).pop("forward", None)


@contextmanager
def compiled_for(args: DistillationConfig, distiller: Distiller) -> Iterator[None]:
    """The student, the teacher or both compiled as the arguments want it."""
    members = [] if distiller.teacher is None else distiller.teacher.members
    teacher_too = args.torch_compile if args.teacher_compile is None else args.teacher_compile
    models = [distiller.student] if args.torch_compile else []
    models += [member.model for member in members if isinstance(member, Teacher)] if teacher_too else []
    with compiled(models, backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode):
        yield


def pieces_of(model: nn.Module) -> dict[nn.Module, bool | None]:
    """The outermost backbone and encoder of a detector, and the layers of its decoder; for each, whether it is
    compiled for any size. Numbers of queries differ from call to call, by the boxes of the images and the questions of
    methods; `None` is torch's choice by the sizes that come."""
    found: dict[nn.Module, bool | None] = {}
    names: list[str] = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if any(name.startswith(f"{outer}.") for outer in names):
            continue
        if last in PIECES:
            found[module] = None
        elif last == "decoder" and isinstance(getattr(module, "layers", None), nn.ModuleList):
            found |= dict.fromkeys(module.layers, True)
        else:
            continue
        names.append(name)
    return found
