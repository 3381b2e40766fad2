"""Loads detectors and image processors by name; one that is not to be had is one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection, PreTrainedModel


def load_detector(name: str, **options: Any) -> PreTrainedModel:
    """A detector in float32.

    Args:
        name (`str`): Hub id or folder.
        options: further arguments of `from_pretrained`, such as `revision` and `trust_remote_code`.

    Raises:
        ValueError: there is no such model.
    """
    return _found(AutoModelForObjectDetection.from_pretrained, "model", name, dtype=torch.float32, **options)


def load_processor(name: str, **options: Any) -> Any:
    """An image processor, see [`load_detector`].

    Raises:
        ValueError: there is no such image processor.
    """
    return _found(AutoImageProcessor.from_pretrained, "image processor", name, **options)


def _found(load: Callable[..., Any], kind: str, name: str, **options: Any) -> Any:
    try:
        return load(name, **options)
    except OSError as error:
        here = "the folder holds none" if Path(name).is_dir() else "there is no such folder, and none on the Hub"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The {kind} {name!r} cannot be loaded: {here} ({reason}).") from error
