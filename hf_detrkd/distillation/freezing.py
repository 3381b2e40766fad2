"""Freezes parameters of a student by name or by backbone stage."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from ..adapters import adapter_for


ROOT = r"(?:conv_encoder\.)?(?:model\.)?(?:_backbone\.)?"


STEM = ROOT + r"(?:embedder|conv1|bn1|stem\w*|conv_stem)\.|model\.(?:swin\.)?embeddings\."


STAGE = (
    ROOT + r"(?:encoder\.stages\.{place}|stages[._]{place}|layer{number}|s{number}|blocks\.{place})\."
    r"|model\.swin\.encoder\.layers\.{place}\."
)


def apply_freezing(model: PreTrainedModel, patterns: list[str] | None) -> None:
    """Makes the whole backbone trainable, then freezes every parameter whose name matches a pattern.

    transformers freezes some backbones entirely and others not at all, so its choice is reset here. Parameters that
    it freezes outside the backbone are constants, such as D-FINE's bins, and stay frozen.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    for _, parameter in adapter_for(model).backbone_parameters():
        parameter.requires_grad_(True)
    parameters = dict(model.named_parameters())
    for pattern in patterns or []:
        names = [name for name in parameters if re.search(pattern, name)]
        if not names:
            known = ", ".join(list(parameters)[:3])
            raise ValueError(f"freeze pattern {pattern!r} matches no parameter; their names look like {known}.")
        for name in names:
            parameters[name].requires_grad_(False)


def usual_stages(model: PreTrainedModel) -> int:
    """Number of backbone stages to freeze when the backbone starts from trained weights: that of the authors of the
    family, or 0 if the backbone has no parts with the usual names of such stages."""
    number = adapter_for(model).frozen_stages
    if any("embeddings" in name for name, _ in stage_parameters(model, 0)):
        return 0  # Swin and ConvNeXt, which the authors train as a whole
    return number if all(stage_parameters(model, part) for part in range(number)) else 0


def freeze_stages(model: PreTrainedModel, number: int) -> list[str]:
    """Freezes the stem and the first stages of a backbone (transformers, timm or torchvision).

    Args:
        model ([`~transformers.PreTrainedModel`]): a detector.
        number (`int`): 0 freezes nothing, 1 the stem, 2 the stem and the first stage (usual in the DETR families with
            pretrained backbones), and so on.

    Returns:
        `list[str]`: names of the frozen parameters.

    Raises:
        ValueError: the backbone has no parameters with the usual names of such stages.
    """
    frozen: list[str] = []
    for part in range(number):
        found = stage_parameters(model, part)
        if not found:
            adapter = adapter_for(model)
            example = adapter.backbone_parameters()[0][0].removeprefix(adapter.backbone_prefix)
            raise ValueError(
                f"freeze_stages is {number}, but the backbone of this {model.config.model_type} has no part {part} "
                f"(0 is the stem): its names look like {example!r}. Use freeze with patterns instead."
            )
        for name, parameter in found:
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def stage_parameters(model: PreTrainedModel, part: int) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of a backbone's stem (`part` 0) or of its n-th stage."""
    adapter = adapter_for(model)
    pattern = STEM if part == 0 else STAGE.format(place=part - 1, number=part)
    prefix = adapter.backbone_prefix
    return [(n, p) for n, p in adapter.backbone_parameters() if re.match(pattern, n.removeprefix(prefix))]
