"""`convert_dino.py` on checkpoints of known numbers: sizes, values, and what the parts compute."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from hf_detrkd.models.dino_detr import convert_checkpoint as convert_dino
from hf_detrkd.models.dino_detr import convert_names as convert_dino_names
from tests.models.conversion.checkpoints import (
    BUILDERS,
    CLASSES,
    DECODER_LAYERS,
    ENCODER_LAYERS,
    FEED_FORWARD,
    HEADS,
    LAYOUTS,
    PARTS,
    POINTS,
    QUERIES,
    WIDTH,
    State,
    both_layouts,
    resnet,
)


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
