"""Names and sizes of the backbones of converted DINO models: ResNet, Swin Transformer and ConvNeXt.

A ResNet becomes a timm model; Swin and ConvNeXt become transformers' own, whose stages end with norms as in both
repositories.
"""

import re
from typing import Any, cast

from torch import Size

from .convert_names import Copies, count


class Shapes(dict[str, Size]):
    """Shapes of the tensors of a checkpoint by translated name; a `ValueError` names one that is missing."""

    def __init__(self, found: Copies):
        super().__init__({place: next(iter(copies.values())).shape for place, copies in found.items()})

    def __missing__(self, place: str) -> Size:
        raise ValueError(f"--checkpoint must have a tensor for {place}, which determines the model size.")


RESNETS = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
"""timm model names by (bottleneck blocks, number of blocks per stage)."""

UNREAD = re.compile(r"backbone\.model\.hidden_states_norms\.stage\d\.")
"""The norm after a stage: the original ConvNeXt has one even where the detector does not read the stage."""

IDLE = re.compile(r"backbone\.model\.swin\.layernorm\.")
"""The last norm of transformers' Swin backbone: without any use, and in no checkpoint."""

ROOT = "backbone.model"


def backbone_of(shapes: Shapes, levels: int) -> dict[str, Any]:
    """The config field of the backbone: timm's name of a ResNet, or the config of a Swin Transformer or ConvNeXt.

    Args:
        shapes ([`Shapes`])
        levels (`int`): number of feature levels of the detector.

    Raises:
        ValueError: the backbone is none of these, or a ResNet of unknown size.
    """
    stems = {"swin.embeddings.patch_embeddings.projection": swin, "embeddings.patch_embeddings": convnext}
    for stem, config in stems.items():
        if f"{ROOT}.{stem}.weight" in shapes:
            stages = min(levels - 1, 4)
            return {"backbone_config": config(shapes) | {"out_indices": list(range(5 - stages, 5))}}
    return {"backbone": resnet(shapes)}


def resnet(shapes: Shapes) -> str:
    """timm's name of a ResNet, from its blocks."""
    bottlenecks = f"{ROOT}.layer1.0.conv3.weight" in shapes
    blocks = tuple(count(shapes, rf"backbone\.model\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
    name = RESNETS.get(cast(Any, (bottlenecks, blocks)))
    if name is None:
        raise ValueError(
            "The backbone must be a ResNet of 18 to 152 layers, a Swin Transformer or a ConvNeXt, but it has the stem "
            f"of neither of the last two, and {blocks} blocks in the stages of a ResNet."
        )
    return name


def swin(shapes: Shapes) -> dict[str, Any]:
    """Config of a Swin Transformer; stochastic depth, which no shape shows, is that of both repositories."""
    layers = f"{ROOT}.swin.encoder.layers"
    width = shapes[f"{ROOT}.swin.embeddings.patch_embeddings.projection.weight"][0]
    biases = [
        shapes[f"{layers}.{stage}.blocks.0.attention.relative_position_bias.relative_position_bias_table"]
        for stage in range(count(shapes, rf"{re.escape(layers)}\.(\d+)\."))
    ]
    return {
        "model_type": "swin",
        "embed_dim": width,
        "depths": [count(shapes, rf"{re.escape(layers)}\.{stage}\.blocks\.(\d+)\.") for stage in range(len(biases))],
        "num_heads": [bias[1] for bias in biases],
        "window_size": (round(biases[0][0] ** 0.5) + 1) // 2,
        "mlp_ratio": shapes[f"{layers}.0.blocks.0.mlp.fc1.weight"][0] / width,
        "drop_path_rate": 0.2,
    }


def convnext(shapes: Shapes) -> dict[str, Any]:
    """Config of a ConvNeXt; neither repository trains it with stochastic depth."""
    stages = f"{ROOT}.encoder.stages"
    depths = [count(shapes, rf"{re.escape(stages)}\.{stage}\.layers\.(\d+)\.") for stage in range(4)]
    return {
        "model_type": "convnext",
        "hidden_sizes": [shapes[f"{stages}.{stage}.layers.0.dwconv.weight"][0] for stage in range(4)],
        "depths": depths,
        "drop_path_rate": 0.0,
    }
