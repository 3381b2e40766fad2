"""Freezes parameters of a student by name or by backbone stage."""

from __future__ import annotations

import re

from transformers import PreTrainedModel

from ..adapters import adapter_for


ROOT = r"(?:conv_encoder\.)?(?:model\.)?(?:_backbone\.)?(?:swin\.)?"


STEM = ROOT + r"(?:embedder|embeddings|conv1|bn1|stem\w*|conv_stem)\."


STAGE = ROOT + r"(?:encoder\.(?:stages|layers)\.{place}|stages[._]{place}|layer{number}|s{number}|blocks\.{place})\."


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
    adapter = adapter_for(model)
    parameters = [(n.removeprefix(adapter.backbone_prefix), n, p) for n, p in adapter.backbone_parameters()]
    frozen: list[str] = []
    for part in range(number):
        pattern = STEM if part == 0 else STAGE.format(place=part - 1, number=part)
        found = [(name, parameter) for short, name, parameter in parameters if re.match(pattern, short)]
        if not found:
            raise ValueError(
                f"freeze_stages is {number}, but the backbone of this {model.config.model_type} has no part {part} "
                f"(0 is the stem): its names look like {parameters[0][0]!r}. Use freeze with patterns instead."
            )
        for name, parameter in found:
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen
