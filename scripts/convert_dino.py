"""Makes a model of this package from a checkpoint of DINO's original repository, or of detrex.

    python scripts/convert_dino.py --checkpoint checkpoint0011_4scale.pth --output_dir dino_r50

    python scripts/convert_dino.py --checkpoint dino_r50.pth --output_dir dino_r50 --config names.json

The size of the model is read off the tensors; its backbone is a ResNet. Every tensor of the checkpoint has a place, or
is an equal copy of one that has, and no place stays empty: otherwise nothing is written.

References:
    [original] IDEA-Research/DINO, https://github.com/IDEA-Research/DINO
    [detrex] IDEA-Research/detrex, projects/dino, https://github.com/IDEA-Research/detrex
"""

import json
import re
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from transformers import DeformableDetrImageProcessor, HfArgumentParser

from hf_detrkd.models import DinoDetrConfig, DinoDetrForObjectDetection


Layout = Literal["original", "detrex"]
Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]
Copies = dict[str, dict[str, Tensor]]
"""Tensors by the place they go to, and for each by the names that it has in the checkpoint."""

LEVELS: dict[Layout, str] = {"original": "transformer.level_embed", "detrex": "transformer.level_embeds"}
"""The tensor that tells the layouts apart."""
POSITIONS: dict[Layout, dict[str, Any]] = {
    "original": {"position_temperature": 20, "centered_positions": False},
    "detrex": {"position_temperature": 10000, "centered_positions": True},
}
HEADS = 8  # of attention, which no shape tells; both repositories have no other number
RESNETS = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
"""timm's names, by whether blocks are bottlenecks, and by how many every stage has."""

SHARED: Rules = [
    (r"^label_enc\.", "denoising_class_content."),
    (r"^transformer\.level_embeds?$", "level_embed"),
    (r"^transformer\.tgt_embed\.", "query_content."),
    (r"^transformer\.(encoder|decoder|enc_output|enc_output_norm)\.", r"\1."),
    (r"^(class|bbox)_embed\.", r"decoder.\1_embed."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
]
ORIGINAL: Rules = [
    (r"^backbone\.0\.body\.", "backbone.model."),
    (r"^transformer\.enc_out_(class|bbox)_embed\.", r"enc_\1_embed."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"^(transformer\.encoder\..+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"^(transformer\.encoder\..+)\.norm2\.", r"\1.final_layer_norm."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"^(transformer\.decoder\..+)\.norm1\.", r"\1.encoder_attn_layer_norm."),  # numbered in another order
    (r"^(transformer\.decoder\..+)\.norm2\.", r"\1.self_attn_layer_norm."),  # than they are used in
    (r"^(transformer\.decoder\..+)\.norm3\.", r"\1.final_layer_norm."),
]
DETREX: Rules = [
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.model.bn1."),
    (r"^backbone\.stem\.", "backbone.model."),
    (r"^backbone\.res([2-5])\.", lambda found: f"backbone.model.layer{int(found[1]) - 1}."),
    (r"^(backbone\..+)\.conv(\d)\.norm\.", r"\1.bn\2."),
    (r"^(backbone\..+)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"^(backbone\..+)\.shortcut\.", r"\1.downsample.0."),
    (r"^neck\.convs\.(\d+)\.conv\.", r"input_proj.\1.0."),
    (r"^neck\.convs\.(\d+)\.norm\.", r"input_proj.\1.1."),
    (r"\.attentions\.0\.attn\.", ".self_attn."),
    (r"\.attentions\.0\.", ".self_attn."),
    (r"\.attentions\.1\.", ".encoder_attn."),
    (r"\.ffns\.0\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffns\.0\.layers\.1\.", ".mlp.fc2."),
    (r"\.norms\.0\.", ".self_attn_layer_norm."),
    (r"^(transformer\.encoder\..+)\.norms\.1\.", r"\1.final_layer_norm."),
    (r"^(transformer\.decoder\..+)\.norms\.1\.", r"\1.encoder_attn_layer_norm."),
    (r"^(transformer\.decoder\..+)\.norms\.2\.", r"\1.final_layer_norm."),
]


@dataclass
class ConvertArguments:
    """Which checkpoint becomes which model."""

    checkpoint: str = field(metadata={"help": "File of torch.save: the weights, or a dict that has them as `model`."})
    output_dir: str = field(metadata={"help": "Folder for the model and its image processor."})
    config: str | None = field(
        default=None,
        metadata={
            "help": "JSON file, or folder of a config.json, whose fields win over those read off the tensors, such as "
            "id2label. Default: none; 91 or 80 classes are then named as COCO's."
        },
    )
    layout: Literal["auto", "original", "detrex"] = field(
        default="auto", metadata={"help": "Repository that wrote the checkpoint. Default: auto, told by its names."}
    )


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The weights in a file, on the CPU; `model` comes before `ema_model`."""
    if not file.is_file():
        raise ValueError(f"--checkpoint must be a file, but {file} is none.")
    with torch.serialization.safe_globals([Namespace]):  # the original repository saves its arguments too
        content = torch.load(file, map_location="cpu", weights_only=True)
    state = content.get("model", content.get("ema_model", content)) if isinstance(content, dict) else {"": content}
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)] if state else ["nothing"]
    if strange:
        raise ValueError(
            f"--checkpoint must hold tensors by name, or have them as `model`, but it holds {strange[:5]}."
        )
    return {name.removeprefix("module."): value for name, value in state.items()}


def layout_of(state: dict[str, Tensor]) -> Layout:
    """The repository whose names the tensors have."""
    for layout, name in LEVELS.items():
        if name in state:
            return layout
    raise ValueError(
        f"--checkpoint must hold one of {sorted(LEVELS.values())}, got names such as {sorted(state)[:5]}."
    )


def translate(state: dict[str, Tensor], layout: Layout) -> Copies:
    """Tensors by the names of [`DinoDetrModel`], joint projections split; a name that fits no rule stays as it is."""
    rules = [*(ORIGINAL if layout == "original" else [*numbered(state), *DETREX]), *SHARED]
    found: Copies = defaultdict(dict)
    for source, tensor in state.items():
        if source.endswith(".num_batches_tracked"):
            continue  # a frozen BatchNorm does not count
        place = source
        for pattern, replacement in rules:
            place = re.sub(pattern, replacement, place)
        if ".in_proj_" in place:
            for part, piece in zip("qkv", tensor.chunk(3), strict=False):
                found[place.replace(".in_proj_", f".{part}_proj.")][source] = piece
        else:
            found[place][source] = tensor
    return dict(found)


def numbered(state: dict[str, Tensor]) -> Rules:
    """Rules of detrex where numbers go on: levels without a stage after the others, the encoder's heads last."""
    levels = count(state, r"neck\.convs\.(\d+)\.")
    layers = count(state, r"transformer\.decoder\.layers\.(\d+)\.")
    return [
        (r"^neck\.extra_convs\.(\d+)\.", lambda found: f"neck.convs.{int(found[1]) + levels}."),
        (rf"^(?:transformer\.decoder\.)?(class|bbox)_embed\.{layers}\.", r"enc_\1_embed."),
    ]


def count(names: Any, pattern: str) -> int:
    """How many different things names that begin with the pattern speak of."""
    return len({match.groups() for name in names if (match := re.match(pattern, name))})


def read_off(found: Copies, fields: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Fields of [`DinoDetrConfig`] that the tensors tell; those that are known already win."""

    def shape(place: str) -> torch.Size:
        if place not in found:
            raise ValueError(f"--checkpoint must have a tensor for {place}, which tells the size of the model.")
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
    """timm's name of the backbone."""
    bottlenecks = "backbone.model.layer1.0.conv3.weight" in found
    blocks = tuple(count(found, rf"backbone\.model\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
    if (bottlenecks, blocks) not in RESNETS:
        raise ValueError(f"The backbone must be a ResNet of 18 to 152 layers, but its stages have {blocks} blocks.")
    return RESNETS[bottlenecks, blocks]


def class_names(number: int) -> list[str]:
    """COCO's, if there are as many as it has with the gaps in its numbers (91) or without (80)."""
    names = ["N/A", *FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]]
    for choice in (names, [name for name in names if name != "N/A"]):
        if len(choice) == number:
            return choice
    return [f"LABEL_{i}" for i in range(number)]


def joined(found: Copies) -> Copies:
    """The same with the heads of all decoder layers as copies of the first."""
    layers, together = count(found, r"decoder\.layers\.(\d+)\."), defaultdict(dict)
    for place, copies in found.items():
        head = re.match(r"(decoder\.(?:class|bbox)_embed)\.(\d+)(\..+)", place)
        together[f"{head[1]}.0{head[3]}" if head and int(head[2]) < layers else place] |= copies
    return dict(together)


def differing(found: Copies) -> list[str]:
    """Names of copies that are not equal: the first of each place, and those that differ from it."""
    names: list[str] = []
    for first, *others in (list(copies.items()) for copies in found.values()):
        strange = [name for name, tensor in others if not torch.equal(tensor, first[1])]
        names += [first[0], *strange] if strange else []
    return names


def convert(
    state: dict[str, Tensor], layout: Layout, fields: dict[str, Any] | None = None
) -> DinoDetrForObjectDetection:
    """The model of a checkpoint.

    Args:
        state (`dict[str, torch.Tensor]`): from [`read_checkpoint`].
        layout (`str`): `"original"` or `"detrex"`.
        fields (`dict[str, Any]`, *optional*): of the config, which win over those read off the tensors.

    Returns:
        [`~hf_detrkd.models.DinoDetrForObjectDetection`]

    Raises:
        ValueError: tensors are missing, unexpected or misshaped, or copies differ.
    """
    found = translate(state, layout)
    config = DinoDetrConfig.from_dict(read_off(found, fields or {}, layout))
    found = joined(found) if config.share_prediction_heads else found
    if strange := differing(found):
        raise ValueError(f"Copies of one tensor must be equal, but these differ: {strange[:5]}.")
    model = DinoDetrForObjectDetection(config)
    tensors = {place: next(iter(copies.values())) for place, copies in found.items()}
    labels = tensors.get("denoising_class_content.weight")
    if labels is not None and len(labels) >= config.num_labels:  # of noised labels alone; padding was zero in both
        tensors["denoising_class_content.weight"] = torch.cat(
            [labels[: config.num_labels], torch.zeros_like(labels[:1])]
        )
    check(model.model.state_dict(), tensors, found)
    model.model.load_state_dict(tensors)
    return model


def check(wanted: dict[str, Tensor], tensors: dict[str, Tensor], found: Copies) -> None:
    """Raises a `ValueError` that names what is missing, unexpected or of another shape, five of each."""
    missing = [place for place in wanted if place not in tensors]
    unexpected = [name for place, copies in found.items() if place not in wanted for name in copies]
    misshaped = [
        f"{next(iter(found[place]))} {tuple(tensors[place].shape)} for {tuple(tensor.shape)}"
        for place, tensor in wanted.items()
        if place in tensors and tensors[place].shape != tensor.shape
    ]
    problems = {"missing for": missing, "unexpected": unexpected, "misshaped": misshaped}
    words = [f"{len(names)} {word} {', '.join(names[:5])}" for word, names in problems.items() if names]
    if words:
        raise ValueError(f"Every tensor of --checkpoint must fit the model, but there are {'; '.join(words)}.")


def read_fields(config: str | None) -> dict[str, Any]:
    """The content of a JSON file, or of the config.json of a folder; nothing without one."""
    if config is None:
        return {}
    path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
    if not path.is_file():
        raise ValueError(f"--config must be a JSON file, or a folder with config.json, but {path} is none.")
    fields = json.loads(path.read_text())
    if fields.get("model_type", DinoDetrConfig.model_type) != DinoDetrConfig.model_type:
        raise ValueError(
            f"--config must be that of a {DinoDetrConfig.model_type}, but it is a {fields['model_type']}'s."
        )
    return fields


def main(argv: list[str]) -> None:
    parser = HfArgumentParser(ConvertArguments, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    (arguments,) = parser.parse_args_into_dataclasses(args=argv)
    state, fields = read_checkpoint(Path(arguments.checkpoint)), read_fields(arguments.config)
    layout = layout_of(state) if arguments.layout == "auto" else arguments.layout
    model = convert(state, layout, fields)
    model.save_pretrained(arguments.output_dir)
    DeformableDetrImageProcessor().save_pretrained(arguments.output_dir)
    labels = list(model.config.id2label.values())
    print(
        f"Converted a checkpoint of the {layout} layout into {arguments.output_dir}: "
        f"{model.config.num_feature_levels} levels, {len(labels)} classes ({', '.join(labels[:4])} ...)."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
