"""Derives the config of a converted DINO model from the checkpoint's tensors and an optional config file."""

import json
from pathlib import Path
from typing import Any

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from . import DinoDetrConfig
from .convert_backbones import Shapes, backbone_of
from .convert_names import Copies, Layout, count, differing, joined


POSITIONS: dict[Layout, dict[str, Any]] = {
    "original": {"position_temperature": 20, "centered_positions": False},
    "detrex": {"position_temperature": 10000, "centered_positions": True},
}
HEADS = 8  # attention heads; not visible in any shape, and 8 in both repositories


def read_off(found: Copies, fields: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Derives the fields of [`DinoDetrConfig`] from tensor shapes; given `fields` override them."""
    shapes = Shapes(found)
    known: dict[str, Any] = {"num_feature_levels": shapes["level_embed"][0], **POSITIONS[layout]}
    known["num_queries"], known["d_model"] = shapes["query_content.weight"]
    if not fields.keys() & {"id2label", "num_labels"}:
        known["id2label"] = dict(enumerate(class_names(shapes["enc_class_embed.weight"][0])))
    for side, attention in (("encoder", "self_attn"), ("decoder", "encoder_attn")):
        layer, heads = f"{side}.layers.0", fields.get(f"{side}_attention_heads", HEADS)
        known[f"{side}_layers"] = count(found, rf"{side}\.layers\.(\d+)\.")
        known[f"{side}_ffn_dim"] = shapes[f"{layer}.mlp.fc1.weight"][0]
        points = shapes[f"{layer}.{attention}.attention_weights.weight"][0]
        known[f"{side}_n_points"] = points // (heads * known["num_feature_levels"])
    known["share_prediction_heads"] = not differing(joined(found))
    if not fields.keys() & {"backbone", "backbone_config"}:
        known |= backbone_of(shapes, known["num_feature_levels"])
    return known | fields


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
