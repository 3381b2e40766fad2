"""Derives the config of a converted DINO model from the checkpoint's tensors and an optional config file."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from . import DinoDetrConfig
from .convert_names import Copies, Layout, count, differing, joined


POSITIONS: dict[Layout, dict[str, Any]] = {
    "original": {"position_temperature": 20, "centered_positions": False},
    "detrex": {"position_temperature": 10000, "centered_positions": True},
}
HEADS = 8  # attention heads; not visible in any shape, and 8 in both repositories
RESNETS = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
"""timm model names by (bottleneck blocks, number of blocks per stage)."""


def read_off(found: Copies, fields: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Derives the fields of [`DinoDetrConfig`] from tensor shapes; given `fields` override them."""

    def shape(place: str) -> torch.Size:
        if place not in found:
            raise ValueError(f"--checkpoint must have a tensor for {place}, which determines the model size.")
        return next(iter(found[place].values())).shape

    known: dict[str, Any] = {"num_feature_levels": shape("level_embed")[0], **POSITIONS[layout]}
    known["num_queries"], known["d_model"] = shape("query_content.weight")
    if not fields.keys() & {"id2label", "num_labels"}:
        known["id2label"] = dict(enumerate(class_names(shape("enc_class_embed.weight")[0])))
    for side, attention in (("encoder", "self_attn"), ("decoder", "encoder_attn")):
        layer, heads = f"{side}.layers.0", fields.get(f"{side}_attention_heads", HEADS)
        known[f"{side}_layers"] = count(found, rf"{side}\.layers\.(\d+)\.")
        known[f"{side}_ffn_dim"] = shape(f"{layer}.mlp.fc1.weight")[0]
        points = shape(f"{layer}.{attention}.attention_weights.weight")[0]
        known[f"{side}_n_points"] = points // (heads * known["num_feature_levels"])
    known["share_prediction_heads"] = not differing(joined(found))
    if not fields.keys() & {"backbone", "backbone_config"}:
        known["backbone"] = resnet_of(found)
    return known | fields


def resnet_of(found: Copies) -> str:
    """timm's name of the backbone, from its blocks."""
    bottlenecks = "backbone.model.layer1.0.conv3.weight" in found
    blocks = tuple(count(found, rf"backbone\.model\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
    found_resnet = RESNETS.get(cast(Any, (bottlenecks, blocks)))
    if found_resnet is None:
        raise ValueError(f"The backbone must be a ResNet of 18 to 152 layers, but its stages have {blocks} blocks.")
    return found_resnet


def class_names(number: int) -> list[str]:
    """COCO's class names for 91 classes (with the gaps in its category ids) or 80, otherwise generic names."""
    names = ["N/A", *FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]]
    for choice in (names, [name for name in names if name != "N/A"]):
        if len(choice) == number:
            return choice
    return [f"LABEL_{i}" for i in range(number)]


def read_fields(config: str | None) -> dict[str, Any]:
    """Reads a JSON file, or the config.json of a folder; empty if `config` is `None`."""
    if config is None:
        return {}
    path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
    if not path.is_file():
        raise ValueError(f"--config must be a JSON file, or a folder with config.json, but {path} is not one.")
    fields = json.loads(path.read_text())
    if fields.get("model_type", DinoDetrConfig.model_type) != DinoDetrConfig.model_type:
        raise ValueError(
            f"--config must have the model type {DinoDetrConfig.model_type}, but it has {fields['model_type']}."
        )
    return fields
