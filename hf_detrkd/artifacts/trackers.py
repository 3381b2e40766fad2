"""Logs the plots of a finished run to the trackers of `report_to`: tensorboard, trackio and wandb."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback
from transformers.integrations import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)
from transformers.utils import logging


logger = logging.get_logger(__name__)
Functions = Mapping[type[TrainerCallback], Callable[..., None]]


def check_installed(names: Iterable[str]) -> None:
    """Refuses trackers of the extra `trackers` that are not installed.

    Args:
        names (`Iterable[str]`): as in `report_to`.

    Raises:
        ImportError: one is missing.
    """
    missing = [name for name in names if name in INSTALLED and not INSTALLED[name]()]
    if missing:
        raise ImportError(
            f"report_to {missing[0]} needs the package {missing[0]}: pip install 'hf-detrkd[trackers]', or in a "
            "checkout pip install '.[trackers]'."
        )


def track_pictures(trainer: Trainer, files: Sequence[Path]) -> None:
    """Logs images to every tracker of a trainer, at its last step. A failing tracker is only a warning.

    Args:
        trainer ([`~transformers.Trainer`]): after its training.
        files (`list[Path]`): image files, logged under their names without suffix.
    """
    pictures = {f"pictures/{file.stem}": file for file in files if file.is_file()}
    _each_tracker(trainer, SENDERS, lambda send, callback: send(callback, trainer, pictures))


def close_trackers(trainer: Trainer) -> None:
    """Ends the trackers' runs, so that the next training in this process gets new ones."""
    _each_tracker(trainer, CLOSERS, lambda close, callback: close(callback))


def reopen_trackers(trainer: Trainer) -> None:
    """Lets later logs start trackio again: transformers before 5.17 takes its finished run for an open one."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TrackioCallback):
            callback._initialized = False


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
                    logger.warning(f"{kind.__name__} failed to log plots or to close: {error!r}. The files are kept.")


def _to_tensorboard(callback: Any, trainer: Trainer, pictures: Mapping[str, Path]) -> None:
    if callback.tb_writer is None:
        callback._init_summary_writer(trainer.args)
    for name, file in pictures.items():
        pixels = np.asarray(Image.open(file).convert("RGB"))
        callback.tb_writer.add_image(name, pixels, trainer.state.global_step, dataformats="HWC")
    callback.tb_writer.flush()


def _to_client(client: str, callback: Any, trainer: Trainer, pictures: Mapping[str, Path]) -> None:
    """For trackio and wandb, which have the same API."""
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


INSTALLED = {"tensorboard": is_tensorboard_available, "trackio": is_trackio_available, "wandb": is_wandb_available}
CLIENTS = {TrackioCallback: "_trackio", WandbCallback: "_wandb"}  # attribute of each callback that holds its module
SENDERS: Functions = {
    TensorBoardCallback: _to_tensorboard,
    **{kind: partial(_to_client, it) for kind, it in CLIENTS.items()},
}
CLOSERS: Functions = {
    TensorBoardCallback: _close_tensorboard,
    **{kind: partial(_close_client, it) for kind, it in CLIENTS.items()},
}
