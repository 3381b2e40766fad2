"""Checkpoints of DINO in the layouts of both repositories, names and shapes written down one by one."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor


State = dict[str, Tensor]
WIDTH, FEED_FORWARD, QUERIES, CLASSES, HEADS, POINTS = 32, 48, 9, 11, 8, 4
ENCODER_LAYERS, DECODER_LAYERS = 2, 3
LAYOUTS = ("original", "detrex")
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def linear(name: str, outputs: int, inputs: int = WIDTH) -> State:
    return {f"{name}.weight": torch.randn(outputs, inputs) * inputs**-0.5, f"{name}.bias": torch.randn(outputs) / 10}


def norm(name: str, width: int = WIDTH) -> State:
    return {f"{name}.weight": 1 + torch.randn(width) / 10, f"{name}.bias": torch.randn(width) / 10}


def perceptron(name: str, *widths: int) -> State:
    state = {}
    for number in range(len(widths) - 1):
        state |= linear(f"{name}.layers.{number}", widths[number + 1], widths[number])
    return state


def deformable(name: str, levels: int) -> State:
    state = linear(f"{name}.sampling_offsets", HEADS * levels * POINTS * 2)
    state |= linear(f"{name}.attention_weights", HEADS * levels * POINTS)
    return state | linear(f"{name}.value_proj", WIDTH) | linear(f"{name}.output_proj", WIDTH)


def attention(name: str) -> State:
    joint = {f"{name}.in_proj_weight": torch.randn(3 * WIDTH, WIDTH) / 6, f"{name}.in_proj_bias": torch.randn(96) / 10}
    return joint | linear(f"{name}.out_proj", WIDTH)


def projection(name: str, norm_name: str, inputs: int, size: int) -> State:
    convolution = {f"{name}.weight": torch.randn(WIDTH, inputs, size, size) / 10, f"{name}.bias": torch.randn(WIDTH)}
    return convolution | norm(norm_name)


def resnet() -> State:
    """torchvision's ResNet-18 with frozen BatchNorm, and random numbers in its buffers."""
    state = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d).state_dict()
    for name in state:
        if name.endswith(("running_var", "bn1.weight", "bn2.weight", "downsample.1.weight")):
            state[name] = 0.5 + torch.rand_like(state[name])
        elif name.endswith(("running_mean", ".bias")):
            state[name] = torch.randn_like(state[name]) / 10
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def original(levels: int = 4, shared: bool = True, label_rows: int = CLASSES + 1) -> State:
    """A checkpoint of IDEA-Research/DINO."""
    state = {f"backbone.0.body.{name}": tensor for name, tensor in resnet().items()}
    channels = [64, 128, 256, 512][5 - levels :]
    for level in range(levels):
        size, inputs = (1, channels[level]) if level < levels - 1 else (3, 512)
        state |= projection(f"input_proj.{level}.0", f"input_proj.{level}.1", inputs, size)
    state |= {"label_enc.weight": torch.randn(label_rows, WIDTH)}
    state |= {"transformer.level_embed": torch.randn(levels, WIDTH)}
    state |= {"transformer.tgt_embed.weight": torch.randn(QUERIES, WIDTH)}
    state |= linear("transformer.enc_output", WIDTH) | norm("transformer.enc_output_norm")
    state |= linear("transformer.enc_out_class_embed", CLASSES)
    state |= perceptron("transformer.enc_out_bbox_embed", WIDTH, WIDTH, WIDTH, 4)
    for number in range(ENCODER_LAYERS):
        layer = f"transformer.encoder.layers.{number}"
        state |= deformable(f"{layer}.self_attn", levels) | norm(f"{layer}.norm1") | norm(f"{layer}.norm2")
        state |= linear(f"{layer}.linear1", FEED_FORWARD) | linear(f"{layer}.linear2", WIDTH, FEED_FORWARD)
    for number in range(DECODER_LAYERS):
        layer = f"transformer.decoder.layers.{number}"
        state |= deformable(f"{layer}.cross_attn", levels) | norm(f"{layer}.norm1")
        state |= attention(f"{layer}.self_attn") | norm(f"{layer}.norm2") | norm(f"{layer}.norm3")
        state |= linear(f"{layer}.linear1", FEED_FORWARD) | linear(f"{layer}.linear2", WIDTH, FEED_FORWARD)
    state |= norm("transformer.decoder.norm")
    state |= perceptron("transformer.decoder.ref_point_head", 2 * WIDTH, WIDTH, WIDTH)
    return state | heads(DECODER_LAYERS, shared)


def detrex(levels: int = 4, shared: bool = False, label_rows: int = CLASSES) -> State:
    """A checkpoint of detrex's projects/dino, with detectron2's names for the backbone."""
    plain, state = resnet(), {}
    for part in ("weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
        state[f"backbone.stem.conv1.{part}"] = plain[f"conv1.{part}" if part == "weight" else f"bn1.{part[5:]}"]
        for stage in range(4):
            for block in range(2):
                here, there = f"backbone.res{stage + 2}.{block}", f"layer{stage + 1}.{block}"
                for name, weight, frozen in (
                    ("conv1", "conv1", "bn1"),
                    ("conv2", "conv2", "bn2"),
                    ("shortcut", "downsample.0", "downsample.1"),
                ):
                    if name != "shortcut" or (stage and not block):
                        source = f"{weight}.weight" if part == "weight" else f"{frozen}.{part[5:]}"
                        state[f"{here}.{name}.{part}"] = plain[f"{there}.{source}"]
    for level, inputs in enumerate([64, 128, 256, 512][5 - levels :]):
        state |= projection(f"neck.convs.{level}.conv", f"neck.convs.{level}.norm", inputs, 1)
    state |= projection("neck.extra_convs.0.conv", "neck.extra_convs.0.norm", 512, 3)
    state |= {"label_enc.weight": torch.randn(label_rows, WIDTH)}
    state |= {"transformer.level_embeds": torch.randn(levels, WIDTH)}
    state |= {"transformer.tgt_embed.weight": torch.randn(QUERIES, WIDTH)}
    state |= linear("transformer.enc_output", WIDTH) | norm("transformer.enc_output_norm")
    for number in range(ENCODER_LAYERS):
        layer = f"transformer.encoder.layers.{number}"
        state |= deformable(f"{layer}.attentions.0", levels) | norm(f"{layer}.norms.0") | norm(f"{layer}.norms.1")
        state |= linear(f"{layer}.ffns.0.layers.0.0", FEED_FORWARD)
        state |= linear(f"{layer}.ffns.0.layers.1", WIDTH, FEED_FORWARD)
    for number in range(DECODER_LAYERS):
        layer = f"transformer.decoder.layers.{number}"
        state |= attention(f"{layer}.attentions.0.attn") | deformable(f"{layer}.attentions.1", levels)
        state |= norm(f"{layer}.norms.0") | norm(f"{layer}.norms.1") | norm(f"{layer}.norms.2")
        state |= linear(f"{layer}.ffns.0.layers.0.0", FEED_FORWARD)
        state |= linear(f"{layer}.ffns.0.layers.1", WIDTH, FEED_FORWARD)
    state |= norm("transformer.decoder.norm")
    state |= perceptron("transformer.decoder.ref_point_head", 2 * WIDTH, WIDTH, WIDTH)
    return state | heads(DECODER_LAYERS + 1, shared)


def heads(number: int, shared: bool) -> State:
    """Heads with their copies in the decoder; equal ones but for detrex's last, that of the encoder, if `shared`."""
    state = {}
    for head in range(number):
        first = 0 if shared and head < DECODER_LAYERS else head
        new = linear("class_embed.N", CLASSES) | perceptron("bbox_embed.N", WIDTH, WIDTH, WIDTH, 4)
        for name, tensor in new.items():
            state[name.replace("N", str(head))] = state.get(name.replace("N", str(first)), tensor)
    return state | {f"transformer.decoder.{name}": tensor.clone() for name, tensor in state.items()}


BUILDERS = {"original": original, "detrex": detrex}
PARTS = {
    "original": ("self_attn", "norm2", "cross_attn", "norm1", "linear1", "linear2", "norm3"),
    "detrex": (
        "attentions.0.attn",
        "norms.0",
        "attentions.1",
        "norms.1",
        "ffns.0.layers.0.0",
        "ffns.0.layers.1",
        "norms.2",
    ),
}
"""In the order in which a decoder layer uses them."""
