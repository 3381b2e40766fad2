"""Loads detectors and image processors by name; one that is not to be had is one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel

from .compat import check_family


def load_detector(name: str, **options: Any) -> PreTrainedModel:
    """A detector in float32.

    Args:
        name (`str`): Hub id or folder.
        options: further arguments of `from_pretrained`, such as `revision` and `trust_remote_code`.

    Raises:
        ValueError: there is no such model, or the installed transformers lacks its family.
    """
    return _found(AutoModelForObjectDetection.from_pretrained, "model", name, dtype=torch.float32, **options)


def load_config(name: str) -> PreTrainedConfig:
    """A model config.

    Args:
        name (`str`): Hub id, folder or JSON file.

    Raises:
        ValueError: there is no such config, or the installed transformers lacks its family.
    """
    return _found(AutoConfig.from_pretrained, "config", name)


def load_processor(name: str, **options: Any) -> Any:
    """An image processor, see [`load_detector`].

    Raises:
        ValueError: there is no such image processor.
    """
    return _found(AutoImageProcessor.from_pretrained, "image processor", name, **options)


def _found(load: Callable[..., Any], kind: str, name: str, **options: Any) -> Any:
    try:
        return load(name, **options)
    except ValueError:
        check_family(_model_type(name, options.get("revision")))
        raise
    except OSError as error:
        is_folder = Path(name).is_dir()
        if name.startswith(("/", ".", "~")) and not is_folder:
            raise ValueError(f"The {kind} {name!r} cannot be loaded: there is no such folder.") from error
        here = "the folder holds none" if is_folder else "there is no such folder, and none on the Hub"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The {kind} {name!r} cannot be loaded: {here} ({reason}).") from error


def _model_type(name: str, revision: str | None) -> str:
    """The model type of a config; empty if there is none."""
    try:
        fields, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except OSError:
        return ""
    return fields.get("model_type", "")
