"""A zoo of tiny random detectors, one per family: built from configs in milliseconds, no network.

Names are those of `DetectorSpec.family`; a family joins by its config in `tiny_configs.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_detrkd.models.compat import is_missing
from tests.tiny_configs import CONFIGS, NUM_DENOISING, NUM_GROUPS, NUM_LAYERS, NUM_QUERIES  # noqa: F401


LABELS = ("circle", "square", "triangle", "star", "cross")
NUM_CLASSES = len(LABELS)
_BUILT: dict[tuple[Any, ...], transformers.PreTrainedModel] = {}


def build(name: str, width: int = 32, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A random detector in eval mode, as `from_config` makes it (a frozen backbone stays frozen), except that every
    parameter is moved a little, so that weights that start at zero cannot hide an error, and that live BatchNorm
    starts at 1.

    Args:
        name (`str`): one of [`FAMILIES`].
        width (`int`): channels of encoder and decoder, a multiple of 32.
        seed (`int`): of the weights.
        overrides: fields of the model's config.

    Returns:
        a copy; the original is kept for the next call, since to copy costs a fifth of building.
    """
    key = (name, width, seed, repr(sorted(overrides.items())))
    if key not in _BUILT:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = transformers.AutoModelForObjectDetection.from_config(config(name, width, **overrides))
            _perturb(model, 0.3 if name == "faster_rcnn" else 1.0)  # deep, and not normalised in eval mode
        _BUILT[key] = model.eval()
    return _copied(_BUILT[key], {})


def config(name: str, width: int = 32, **overrides: Any) -> transformers.PreTrainedConfig:
    """The config of [`build`]."""
    if is_missing(name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    settings = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    return CONFIGS[name](width, settings | overrides)


def batch(
    size: int | tuple[int, int] = 64,
    padded: bool = False,
    boxes: Sequence[int] = (2, 1),
    masked: bool | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Random images with as many boxes each as `boxes` says: `pixel_values`, `pixel_mask` and `labels`.

    Args:
        size (`int` or `tuple[int, int]`): height and width of the images, in pixels.
        padded (`bool`): the last image ends after three quarters of its height and of its width; the rest is padding.
        masked (`bool`, *optional*): whether there is a `pixel_mask`; default: if `padded`.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(len(boxes), 3, height, width, generator=generator)
    mask = torch.ones(len(boxes), height, width, dtype=torch.long)
    if padded:
        mask[-1, height * 3 // 4 :] = 0
        mask[-1, :, width * 3 // 4 :] = 0
    inputs: dict[str, Any] = {"pixel_values": pixels * mask[:, None]}
    if padded if masked is None else masked:
        inputs["pixel_mask"] = mask
    return inputs | {"labels": [random_label(count, generator) for count in boxes]}


def random_label(count: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Ground truth of one image with `count` boxes."""
    classes = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
    return {"class_labels": classes, "boxes": random_boxes(count, generator=generator)}


def random_boxes(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """cxcywh in [0, 1], inside the image, of shape `(*shape, 4)`."""
    sizes = torch.rand(*shape, 2, generator=generator) * 0.4 + 0.05
    centers = sizes / 2 + torch.rand(*shape, 2, generator=generator) * (1 - sizes)
    return torch.cat([centers, sizes], -1)


def random_index(layers: int, batch: int, queries: int, most: int) -> Tensor:
    """A random assignment with padding and with boxes that found no query."""
    index = torch.full((layers, batch, most), -1)
    for row in index.flatten(0, 1):
        count = min(int(torch.randint(0, most + 1, ())), queries)
        row[torch.randperm(most)[:count]] = torch.randperm(queries)[:count]
    return index


def _copied(module: nn.Module, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy`, three times as fast: nearly all that it looks at are the empty dictionaries of hooks."""
    if id(module) in memo:
        return memo[id(module)]
    new = memo[id(module)] = object.__new__(type(module))
    for name, value in vars(module).items():
        if name == "_modules":
            new.__dict__[name] = {key: child and _copied(child, memo) for key, child in value.items()}
        elif isinstance(value, dict | set) and not value:
            new.__dict__[name] = type(value)()
        else:
            new.__dict__[name] = copy.deepcopy(value, memo)
    return new


def _perturb(model: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("decoder.up", "decoder.reg_scale")):
                continue  # constants, which the loss takes from the config
            fan_in = parameter[0].numel()
            parameter.add_(amount * torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else fan_in**-0.5))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1.0)
            if isinstance(module, nn.Embedding):
                module.weight.normal_()  # queries that differ as much as trained ones do


DETECTORS = tuple(CONFIGS)
FAMILIES = tuple(name for name in DETECTORS if name != "faster_rcnn")
"""Those of set prediction, which share one contract."""
ASKABLE = tuple(name for name in FAMILIES if name != "yolos")
"""Those whose decoder takes queries from outside."""
HYBRID = tuple(name for name in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2") if name in CONFIGS)
"""Those of RT-DETR's line: contents are encoder tokens, and a model's outputs hold its denoising rows."""
DENOISING = ("dino_detr", *HYBRID)
"""Those with denoising queries in training; their own queries are proposals of the encoder."""
GROUPED = tuple(name for name in ("lw_detr", "rf_detr") if name in CONFIGS)
"""Those with groups of queries in training."""
UNBOUNDED = (*(name for name in HYBRID if not name.startswith("rt_detr")), *GROUPED)
"""Those whose boxes pass no sigmoid and may leave the image: rounding grows with random ones."""
