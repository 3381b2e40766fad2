"""Checkpoint files besides `Trainer`'s: the student, and in `distillation/` the state that only resuming needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..distillation.distiller import Distiller
from .ema import StudentAverage, load_whole


STATE_FOLDER = "distillation"
METHOD_WEIGHTS = "method.safetensors"
METHOD_CONFIG = "method.json"


def save_state(
    distiller: Distiller, average: StudentAverage | None, checkpoint: Path, weights: Mapping[str, Tensor]
) -> None:
    """Writes the methods' projections and options, the loss weights and the student's EMA into a checkpoint.

    Args:
        distiller ([`Distiller`]), average ([`StudentAverage`], *optional*), checkpoint (`Path`)
        weights (`dict[str, torch.Tensor]`): trained ones, whole, by their names in the distiller, also where it is
            sharded.
    """
    folder = checkpoint / STATE_FOLDER
    methods: Any = distiller.methods
    if methods or average is not None:
        folder.mkdir(exist_ok=True)
    if average is not None:
        average.save(folder, part_of(weights, "student."))
    if not methods:
        return
    save_file(part_of(weights, "methods."), folder / METHOD_WEIGHTS)
    options = {
        "methods": {name: vars(method.config) for name, method in methods.items()},
        "loss_weights": distiller.loss_weights,
    }
    (folder / METHOD_CONFIG).write_text(json.dumps(options, indent=2))


def load_state(distiller: Distiller, average: StudentAverage | None, checkpoint: Path, calibrated: bool) -> None:
    """Loads what [`save_state`] wrote.

    Args:
        distiller ([`Distiller`]), average ([`StudentAverage`], *optional*): of the resumed run.
        checkpoint (`Path`)
        calibrated (`bool`): also load the loss weights, which may have been calibrated.

    Raises:
        ValueError: the checkpoint is from a run with other methods.
    """
    folder = checkpoint / STATE_FOLDER
    if distiller.methods:
        file = folder / METHOD_CONFIG
        saved = json.loads(file.read_text()) if file.is_file() else {"methods": {}}
        if list(saved["methods"]) != list(distiller.methods):
            raise ValueError(
                f"{checkpoint} was not saved by a run with --method {','.join(distiller.methods)} but with "
                f"{','.join(saved['methods']) or 'none'} (its state is in {STATE_FOLDER}/): resume with that method, "
                "or start a new run from it with --model_name_or_path."
            )
        load_whole(distiller.methods, load_file(file.with_name(METHOD_WEIGHTS)))
        if calibrated:
            distiller.loss_weights = saved["loss_weights"]
    if average is not None:
        average.load(folder)


def load_student_weights(student: PreTrainedModel, folder: Path) -> None:
    """Loads the weights of a checkpoint into an existing student.

    Raises:
        ValueError: the folder holds no `model.safetensors`.
    """
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        raise ValueError(f"{folder} holds no {SAFE_WEIGHTS_NAME}: resume from a checkpoint folder of this trainer.")
    state = type(student).from_pretrained(folder, dtype=torch.float32).state_dict()
    load_whole(student, state)


def part_of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin so, by the rest of their names."""
    return {k.removeprefix(prefix): v.contiguous() for k, v in weights.items() if k.startswith(prefix)}
