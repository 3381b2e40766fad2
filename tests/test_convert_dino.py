"""`convert_dino.py` on checkpoints whose names and shapes are written down here, one by one."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from hf_detrkd.models import DinoDetrForObjectDetection


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import convert_dino  # noqa: E402
import convert_dino_config  # noqa: E402
import convert_dino_names  # noqa: E402


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


# --- values ----------------------------------------------------------------------------------------------------------

SAME = {
    "level_embed": ("transformer.level_embed", "transformer.level_embeds"),
    "query_content.weight": ("transformer.tgt_embed.weight",) * 2,
    "enc_output.weight": ("transformer.enc_output.weight",) * 2,
    "enc_output_norm.bias": ("transformer.enc_output_norm.bias",) * 2,
    "enc_class_embed.weight": ("transformer.enc_out_class_embed.weight", "class_embed.3.weight"),
    "enc_bbox_embed.layers.2.bias": ("transformer.enc_out_bbox_embed.layers.2.bias", "bbox_embed.3.layers.2.bias"),
    "input_proj.0.0.weight": ("input_proj.0.0.weight", "neck.convs.0.conv.weight"),
    "input_proj.2.1.bias": ("input_proj.2.1.bias", "neck.convs.2.norm.bias"),
    "decoder.norm.weight": ("transformer.decoder.norm.weight",) * 2,
    "decoder.ref_point_head.layers.1.weight": ("transformer.decoder.ref_point_head.layers.1.weight",) * 2,
    "decoder.class_embed.0.bias": ("class_embed.0.bias",) * 2,
    "decoder.bbox_embed.0.layers.1.weight": ("bbox_embed.0.layers.1.weight",) * 2,
}


@both_layouts
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("levels", [4, 5])
def test_size_and_values_are_those_of_the_checkpoint(layout: str, shared: bool, levels: int) -> None:
    state = BUILDERS[layout](levels, shared)
    model = convert_dino.convert(state, convert_dino_names.layout_of(state))
    config, found = model.config, model.model.state_dict()
    assert (config.num_labels, config.num_queries, config.d_model) == (CLASSES, QUERIES, WIDTH)
    assert (config.encoder_layers, config.decoder_layers) == (ENCODER_LAYERS, DECODER_LAYERS)
    assert config.encoder_ffn_dim == config.decoder_ffn_dim == FEED_FORWARD
    assert config.encoder_n_points == config.decoder_n_points == POINTS
    assert (config.num_feature_levels, config.share_prediction_heads) == (levels, shared)
    positions = (config.position_temperature, config.centered_positions)
    assert positions == ((20, False) if layout == "original" else (10000, True))
    for place, names in SAME.items():
        assert torch.equal(found[place], state[names[LAYOUTS.index(layout)]]), place
    last = f"neck.extra_convs.0.{'conv'}" if layout == "detrex" else f"input_proj.{levels - 1}.0"
    assert torch.equal(found[f"input_proj.{levels - 1}.0.weight"], state[f"{last}.weight"])
    if not shared:
        for number in range(DECODER_LAYERS):
            assert torch.equal(found[f"decoder.class_embed.{number}.weight"], state[f"class_embed.{number}.weight"])
    model(pixel_values=torch.randn(1, 3, 128, 128))


@pytest.mark.parametrize(
    ("layout", "rows"), [("original", CLASSES + 1), ("original", CLASSES + 10), ("detrex", CLASSES)]
)
def test_labels_of_denoising_are_those_of_the_classes_and_padding_is_zero(layout: str, rows: int) -> None:
    state = BUILDERS[layout](label_rows=rows)
    labels = convert_dino.convert(state, layout).model.denoising_class_content.weight
    assert labels.shape == (CLASSES + 1, WIDTH) and not labels[-1].any()
    assert torch.equal(labels[:-1], state["label_enc.weight"][:CLASSES])


@both_layouts
def test_the_backbone_computes_what_torchvision_s_does(layout: str) -> None:
    torch.manual_seed(0)
    weights = resnet()
    torch.manual_seed(0)
    state = BUILDERS[layout]()
    reference = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    reference.load_state_dict(weights, strict=False)  # but for the classifier
    stages = {f"layer{number}": str(number) for number in (2, 3, 4)}
    reference = torchvision.models._utils.IntermediateLayerGetter(reference, stages)
    model, pixels = convert_dino.convert(state, layout), torch.randn(1, 3, 64, 96)
    features = model.model.backbone(pixels, torch.ones(1, 64, 96))
    for (found, _), expected in zip(features, reference(pixels).values(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


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


def part(state: State, name: str) -> State:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}


@torch.no_grad()
@both_layouts
def test_a_decoder_layer_computes_what_its_repository_s_does(layout: str) -> None:
    state = BUILDERS[layout]()
    model = convert_dino.convert(state, layout).eval()
    names = [f"transformer.decoder.layers.1.{name}" for name in PARTS[layout]]
    inner, inner_norm, cross, cross_norm, widen, narrow, last_norm = (part(state, name) for name in names)
    together = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    together.load_state_dict(inner)
    layer = model.model.decoder.layers[1]
    assert all(torch.equal(tensor, cross[name]) for name, tensor in layer.encoder_attn.state_dict().items())

    def normal(values: Tensor, weights: State) -> Tensor:
        return nn.functional.layer_norm(values, (WIDTH,), weights["weight"], weights["bias"])

    def apply(values: Tensor, weights: State) -> Tensor:
        return nn.functional.linear(values, weights["weight"], weights["bias"])

    states, position, memory = torch.randn(3, 1, 20, WIDTH)
    shapes = {"spatial_shapes": torch.tensor([[2, 4], [2, 3], [2, 2], [1, 2]])}
    shapes |= {"spatial_shapes_list": [(2, 4), (2, 3), (2, 2), (1, 2)], "encoder_hidden_states": memory}
    shapes |= {"reference_points": torch.rand(1, 20, 4, 4), "level_start_index": torch.tensor([0, 8, 14, 18])}
    expected = normal(states + together(states + position, states + position, states)[0], inner_norm)
    attended = layer.encoder_attn(expected, position_embeddings=position, **shapes)[0]
    expected = normal(expected + attended, cross_norm)
    expected = normal(expected + apply(apply(expected, widen).relu(), narrow), last_norm)
    torch.testing.assert_close(layer(states, position, **shapes), expected, atol=1e-5, rtol=1e-5)
    encoder, source = model.model.encoder.layers[1], part(state, "transformer.encoder.layers.1")
    for norms, place in (("norm1", encoder.self_attn_layer_norm), ("norm2", encoder.final_layer_norm)):
        norms = norms if layout == "original" else f"norms.{int(norms[-1]) - 1}"
        assert torch.equal(place.weight, source[f"{norms}.weight"]) and torch.equal(
            place.bias, source[f"{norms}.bias"]
        )


# --- refusals --------------------------------------------------------------------------------------------------------


@both_layouts
def test_whatever_does_not_fit_is_named(layout: str) -> None:
    state = BUILDERS[layout]()
    norms = f"transformer.decoder.layers.2.{PARTS[layout][1]}"
    missing = {name: tensor for name, tensor in state.items() if name != f"{norms}.bias"}
    with pytest.raises(ValueError, match=r"1 missing for decoder\.layers\.2\.self_attn_layer_norm\.bias\."):
        convert_dino.convert(missing, layout)
    with pytest.raises(
        ValueError, match=r"2 unexpected refpoint_embed\.weight, transformer\.encoder\.layers\.0\.more"
    ):
        strange = {"refpoint_embed.weight": torch.ones(2), "transformer.encoder.layers.0.more.weight": torch.ones(2)}
        convert_dino.convert(state | strange, layout)
    with pytest.raises(ValueError, match=rf"1 misshaped {norms}\.weight \(31,\) for \(32,\)\."):
        convert_dino.convert(state | {f"{norms}.weight": torch.ones(31)}, layout)
    with pytest.raises(ValueError, match=r"misshaped label_enc\.weight \(10, 32\) for \(12, 32\)"):
        convert_dino.convert(state | {"label_enc.weight": torch.ones(10, 32)}, layout)
    with pytest.raises(ValueError, match=r"must have a tensor for query_content\.weight, which tells the size"):
        convert_dino.convert({name: t for name, t in state.items() if "tgt_embed" not in name}, layout)
    with pytest.raises(ValueError, match=r"a ResNet of 18 to 152 layers, but its stages have \(2, 2, 2, 0\) blocks"):
        convert_dino.convert({n: t for n, t in state.items() if "layer4." not in n and "res5." not in n}, layout)


@both_layouts
def test_copies_that_differ_and_heads_without_a_layer_are_refused(layout: str) -> None:
    state, name = BUILDERS[layout](), "bbox_embed.1.layers.0.weight"
    copy = f"transformer.decoder.{name}"
    with pytest.raises(ValueError, match=re.escape(f"these differ: {[name, copy]}.")):
        convert_dino.convert(state | {copy: state[copy] + 1e-6}, layout)
    shorter = {name: t for name, t in BUILDERS[layout]().items() if "decoder.layers.2." not in name}
    with pytest.raises(ValueError, match="unexpected"):
        convert_dino.convert(shorter, layout)
    with pytest.raises(ValueError, match="Copies of one tensor must be equal, but these differ"):
        convert_dino.convert(BUILDERS[layout](shared=False), layout, {"share_prediction_heads": True})


def test_files_and_layouts_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a file, but"):
        convert_dino.read_checkpoint(tmp_path / "nowhere.pth")
    torch.save({"model": {"a": torch.ones(1), "b": 3}}, tmp_path / "strange.pth")
    with pytest.raises(ValueError, match=r"must hold tensors by name, or have them as `model`, but it holds \['b'\]"):
        convert_dino.read_checkpoint(tmp_path / "strange.pth")
    with pytest.raises(ValueError, match=r"one of \['transformer.level_embed', .*got names such as \['a'\]"):
        convert_dino_names.layout_of({"a": torch.ones(1)})
    (tmp_path / "config.json").write_text('{"model_type": "rt_detr"}')
    with pytest.raises(ValueError, match="must be that of a dino_detr, but it is a rt_detr's"):
        convert_dino_config.read_fields(str(tmp_path))


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_model_and_a_processor_that_load(tmp_path: Path) -> None:
    state = original()
    stored = {"model": {f"module.{name}": tensor for name, tensor in state.items()}, "ema_model": {}, "epoch": 11}
    torch.save(stored | {"args": argparse.Namespace(nheads=8)}, tmp_path / "checkpoint.pth")
    names = {str(i): f"class {i}" for i in range(CLASSES)}
    (tmp_path / "names.json").write_text(json.dumps({"id2label": names}))
    command = [sys.executable, "scripts/convert_dino.py", "--checkpoint", str(tmp_path / "checkpoint.pth")]
    command += ["--output_dir", str(tmp_path / "out"), "--config", str(tmp_path / "names.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of the original layout" in done.stdout and "11 classes (class 0, class 1" in done.stdout
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "out")
    assert type(model) is DinoDetrForObjectDetection and list(model.config.id2label.values()) == list(names.values())
    expected = convert_dino.convert(state, "original").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size == {"shortest_edge": 800, "longest_edge": 1333}
    again = convert_dino.convert(state, "original", convert_dino_config.read_fields(str(tmp_path / "out")))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert again.config.id2label == model.config.id2label


@pytest.mark.parametrize(("number", "first", "last"), [(91, "N/A", "toothbrush"), (80, "person", "toothbrush")])
def test_as_many_classes_as_coco_s_have_its_names(number: int, first: str, last: str) -> None:
    names = convert_dino_config.class_names(number)
    assert (len(names), names[0], names[-1]) == (number, first, last)
    assert names.index("zebra") == (24 if number == 91 else 22)
    assert convert_dino_config.class_names(3) == ["LABEL_0", "LABEL_1", "LABEL_2"]
