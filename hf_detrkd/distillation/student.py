"""Loads a student from the Hub or builds it from a config, with the classes of the data set."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..adapters import ADAPTERS, adapter_for, class_names
from ..models.compat import processor_class
from ..models.loading import load_config, load_detector, load_processor


logger = logging.get_logger(__name__)


def load_student(
    name_or_path: str, classes: Sequence[str], revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Loads a detector from the Hub or a folder in float32, with a class head for the given classes.

    Args:
        name_or_path (`str`): Hub id or folder.
        classes (`Sequence[str]`): class names in the order of the data set's indices.
        revision (`str`): branch, tag or commit on the Hub.
        trust_remote_code (`bool`): run the model's own code from the Hub.
    """
    model = load_detector(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    return with_classes(model, classes)


def build_student(config_name: str, classes: Sequence[str], trained_backbone: bool = False) -> PreTrainedModel:
    """Builds a detector with random weights from a model config.

    The weights of trainable BatchNorm layers start at 1: transformers initialises those of RT-DETR near 0, where they
    hardly learn.

    Args:
        config_name (`str`): Hub id, folder, or JSON file of a model config.
        classes (`Sequence[str]`): class names.
        trained_backbone (`bool`): the backbone will get trained weights; a Faster R-CNN then freezes its BatchNorm,
            as torchvision does, unless its config says otherwise.
    """
    config = set_classes(load_config(config_name), classes)
    if trained_backbone and getattr(config, "frozen_batch_norm", False) is None:
        config.frozen_batch_norm = True
    model = AutoModelForObjectDetection.from_config(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return model


def set_classes(config: PreTrainedConfig, classes: Sequence[str]) -> PreTrainedConfig:
    """Returns a copy of a model config with other classes."""
    config = copy.deepcopy(config)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    return config


def with_classes(model: PreTrainedModel, classes: Sequence[str]) -> PreTrainedModel:
    """The same detector with other classes: rows of classes of the same name are kept, the others reinitialised.

    Class-dependent tensors are those whose first dimension grows with `num_labels`, by one or several rows per class.
    Their rows that belong to no class (no-object, the padding of denoising embeddings) are kept.
    """
    old_names = class_names(model.config)
    if old_names == list(classes):
        return model
    logger.warning(
        f"The checkpoint's {len(old_names)} classes differ from the data set's {len(classes)}: the class head is "
        f"reinitialised except for {len(set(old_names) & set(classes))} classes of the same name."
    )
    new = type(model)(set_classes(model.config, classes))
    wider = type(model)(set_classes(model.config, [*classes, "one more"]))
    shapes = {name: value.shape for name, value in wider.state_dict().items()}
    old_state, new_state = model.state_dict(), new.state_dict()
    kept = [(old_names.index(name), index) for index, name in enumerate(classes) if name in old_names]
    background_first = adapter_for(model).background_first
    for name, value in new_state.items():
        if value.shape == shapes[name]:
            value.copy_(old_state[name])
            continue
        size = shapes[name][0] - len(value)  # rows per class
        other = len(value) - size * len(classes)  # rows that belong to no class
        first = other if background_first else 0
        for old_index, index in kept:
            old = old_state[name][first + old_index * size :][:size]
            value[first + index * size :][:size].copy_(old)
        if other:
            behind = slice(0, other) if background_first else slice(-other, None)
            value[behind].copy_(old_state[name][behind])
    return new


def load_backbone_weights(model: PreTrainedModel, file: str) -> None:
    """Loads the weights of a classifier into a detector's backbone; other tensors of the file are ignored.

    Args:
        file (`str`): safetensors file with the tensor names of timm or torchvision, which are suffixes of the
            backbone's names.

    Raises:
        ValueError: the file does not fit this backbone; the message names the tensors.
    """
    if not Path(file).is_file():
        raise ValueError(f"backbone_weights must be a safetensors file, but {file} does not exist.")
    given = load_file(file)
    names = [name for name, _ in adapter_for(model).backbone_parameters()]
    first = next((n for n in given if any(name.endswith(f".{n}") for name in names)), None)
    if first is None:
        raise ValueError(
            f"{file} is not for this backbone: its names look like {next(iter(given))!r}, "
            f"the backbone's like {names[0]!r}."
        )
    prefix = next(name for name in names if name.endswith(f".{first}")).removesuffix(first)
    own = {n.removeprefix(prefix): value for n, value in model.state_dict().items() if n.startswith(prefix)}
    needed = {n: value.shape for n, value in own.items() if not n.endswith("num_batches_tracked")}
    wrong = [n for n, shape in needed.items() if n not in given or given[n].shape != shape]
    if wrong:
        raise ValueError(
            f"{file} does not fit the backbone: {len(wrong)} tensors are missing or have another shape: {wrong[:5]}."
        )
    model.load_state_dict({prefix + n: value for n, value in given.items() if n in own}, strict=False)


def load_image_processor(
    model: PreTrainedModel,
    name_or_path: str | None = None,
    image_size: tuple[int, int] | None = None,
    keep_aspect_ratio: bool = False,
    revision: str = "main",
) -> Any:
    """Loads or builds the image processor that is saved with a student.

    Args:
        model: determines the default processor if `name_or_path` is not given.
        name_or_path (`str`, *optional*): Hub id or folder to load it from. Default: the family's default processor.
        image_size (`tuple[int, int]`, *optional*): (height, width) in pixels; images are resized to it without
            padding, or with `keep_aspect_ratio` to fit into it.
        keep_aspect_ratio (`bool`): resize without distortion and pad.
        revision (`str`): branch, tag or commit on the Hub.

    Raises:
        ValueError: `keep_aspect_ratio` without a size to fit into.
    """
    if name_or_path is not None:
        processor = load_processor(name_or_path, revision=revision)
    else:
        own = model.config.model_type
        config_class = CONFIG_MAPPING[ADAPTERS[own].processor_type or own]
        processor = processor_class(config_class)()
    if image_size is not None:
        height, width = image_size
        if keep_aspect_ratio:
            processor.size = {"shortest_edge": min(height, width), "longest_edge": max(height, width)}
        else:
            processor.size = {"height": height, "width": width}
        processor.do_pad = keep_aspect_ratio
    elif keep_aspect_ratio and "height" in dict(processor.size):
        raise ValueError(
            f"keep_aspect_ratio needs image_size, HEIGHTxWIDTH into which images are fitted: this image processor "
            f"stretches them to {processor.size}."
        )
    return processor
