"""The pictures of a finished run for the trackers of `report_to`: tensorboard, trackio and wandb."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)
Functions = Mapping[type[TrainerCallback], Callable[..., None]]


def track_pictures(trainer: Trainer, files: Sequence[Path]) -> None:
    """Logs pictures with every tracker of a trainer, at its last step. A tracker that fails is a warning.

    Args:
        trainer ([`~transformers.Trainer`]): after its training.
        files (`list[Path]`): pictures, known to the tracker by their names without ending.
    """
    pictures = {f"pictures/{file.stem}": file for file in files if file.is_file()}
    _each_tracker(trainer, SENDERS, lambda send, callback: send(callback, trainer, pictures))


def close_trackers(trainer: Trainer) -> None:
    """Ends the trackers' runs, so that another training of this process has runs of its own."""
    _each_tracker(trainer, CLOSERS, lambda close, callback: close(callback))


def _each_tracker(
    trainer: Trainer,
    functions: Functions,
    use: Callable[[Callable[..., None], Any], None],
) -> None:
    if not trainer.is_world_process_zero():
        return
    for callback in trainer.callback_handler.callbacks:
        for kind, function in functions.items():
            if isinstance(callback, kind):
                try:
                    use(function, callback)
                except Exception as error:  # every tracker and its network have errors of their own
                    logger.warning(f"{kind.__name__} did not take the run's pictures or end: {error!r}. They stay.")


def _to_tensorboard(callback: Any, trainer: Trainer, pictures: Mapping[str, Path]) -> None:
    if callback.tb_writer is None:
        callback._init_summary_writer(trainer.args)
    for name, file in pictures.items():
        pixels = np.asarray(Image.open(file).convert("RGB"))
        callback.tb_writer.add_image(name, pixels, trainer.state.global_step, dataformats="HWC")
    callback.tb_writer.flush()


def _to_client(client: str, callback: Any, trainer: Trainer, pictures: Mapping[str, Path]) -> None:
    """trackio and wandb, whose clients are alike."""
    if not callback._initialized:
        callback.setup(trainer.args, trainer.state, trainer.model)
    module = getattr(callback, client)
    shown = {name: module.Image(str(file)) for name, file in pictures.items()}
    module.log(shown | {"train/global_step": trainer.state.global_step})


def _close_tensorboard(callback: Any) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.close()
        callback.tb_writer = None


def _close_client(client: str, callback: Any) -> None:
    if callback._initialized:
        getattr(callback, client).finish()
        callback._initialized = False


CLIENTS = {TrackioCallback: "_trackio", WandbCallback: "_wandb"}  # where each callback keeps its module
SENDERS: Functions = {
    TensorBoardCallback: _to_tensorboard,
    **{kind: partial(_to_client, it) for kind, it in CLIENTS.items()},
}
CLOSERS: Functions = {
    TensorBoardCallback: _close_tensorboard,
    **{kind: partial(_close_client, it) for kind, it in CLIENTS.items()},
}
