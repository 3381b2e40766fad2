"""Converts a checkpoint of DINO's original repository or of detrex to a model of this package.

    python scripts/convert_dino.py --checkpoint checkpoint0011_4scale.pth --output_dir dino_r50

    python scripts/convert_dino.py --checkpoint dino_r50.pth --output_dir dino_r50 --config names.json

The model size is derived from the tensor shapes; the backbone must be a ResNet, a Swin Transformer or a ConvNeXt.
Nothing is written unless every tensor of the checkpoint is used or is a copy of one that is used, and every tensor of
the model is set.

References:
    [original] IDEA-Research/DINO, https://github.com/IDEA-Research/DINO
    [detrex] IDEA-Research/detrex, projects/dino, https://github.com/IDEA-Research/detrex
"""

from argparse import Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DeformableDetrImageProcessor, HfArgumentParser

from . import DinoDetrConfig, DinoDetrForObjectDetection
from .convert_backbones import IDLE, UNREAD
from .convert_config import read_fields, read_off
from .convert_names import Copies, Layout, differing, joined, layout_of, translate


@dataclass
class ConvertArguments:
    """Arguments of the conversion."""

    checkpoint: str = field(
        metadata={"help": "Checkpoint file of torch.save: the weights, or a dict with the key `model` for them."}
    )
    output_dir: str = field(metadata={"help": "Output folder of the model and its image processor."})
    config: str | None = field(
        default=None,
        metadata={
            "help": "JSON file, or folder with a config.json, whose fields override those derived from the tensors, "
            "for example id2label. Default: none; 91 or 80 classes then get COCO's names."
        },
    )
    layout: Literal["auto", "original", "detrex"] = field(
        default="auto",
        metadata={
            "help": "Repository that wrote the checkpoint: original or detrex. Default: auto, by its tensor names."
        },
    )


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """Reads the weights of a file onto the CPU; the key `model` is preferred to `ema_model`."""
    if not file.is_file():
        raise ValueError(f"--checkpoint must be a file, but {file} is not one.")
    with torch.serialization.safe_globals([Namespace]):  # the original repository saves its arguments too
        content = torch.load(file, map_location="cpu", weights_only=True)
    state: Any = (
        content.get("model", content.get("ema_model", content)) if isinstance(content, dict) else {"": content}
    )
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)] if state else ["nothing"]
    if strange:
        raise ValueError(
            f"--checkpoint must contain tensors by name, or under the key `model`, but it contains {strange[:5]}."
        )
    return {name.removeprefix("module."): value for name, value in state.items()}


def convert(
    state: dict[str, Tensor], layout: Layout, fields: dict[str, Any] | None = None
) -> DinoDetrForObjectDetection:
    """Builds the model of a checkpoint.

    Args:
        state (`dict[str, torch.Tensor]`): from [`read_checkpoint`].
        layout (`str`): `"original"` or `"detrex"`.
        fields (`dict[str, Any]`, *optional*): config fields that override those derived from the tensors.

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
    wanted = model.model.state_dict()
    found = {place: copies for place, copies in found.items() if place in wanted or not UNREAD.match(place)}
    tensors = {place: next(iter(copies.values())) for place, copies in found.items()}
    labels = tensors.get("denoising_class_content.weight")
    if labels is not None and len(labels) >= config.num_labels:  # label rows only: both layouts pad with zeros
        tensors["denoising_class_content.weight"] = torch.cat(
            [labels[: config.num_labels], torch.zeros_like(labels[:1])]
        )
    tensors |= {place: tensor for place, tensor in wanted.items() if IDLE.match(place)}
    check(wanted, tensors, found)
    model.model.load_state_dict(tensors)
    return model


def check(wanted: dict[str, Tensor], tensors: dict[str, Tensor], found: Copies) -> None:
    """Raises a `ValueError` that lists missing, unexpected and misshaped tensors, up to five of each."""
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
