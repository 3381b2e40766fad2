"""DINO's defaults, what a new model starts from, and its feature levels."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from hf_detrkd.models import DinoDetrConfig
from tests import tiny
from tests.models.dino_detr import Build, asked, run


def test_defaults_are_the_paper_s() -> None:
    config = DinoDetrConfig()
    expected = {
        "num_queries": 900,
        "num_denoising": 100,
        "label_noise_ratio": 0.5,
        "box_noise_scale": 1.0,
        "num_feature_levels": 4,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_ffn_dim": 2048,
        "decoder_ffn_dim": 2048,
        "d_model": 256,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "encoder_n_points": 4,
        "decoder_n_points": 4,
        "dropout": 0.0,
        "activation_function": "relu",
        "position_temperature": 20,
        "share_prediction_heads": True,
        "class_cost": 2,
        "bbox_cost": 5,
        "giou_cost": 2,
        "class_loss_coefficient": 1,
        "bbox_loss_coefficient": 5,
        "giou_loss_coefficient": 2,
        "focal_alpha": 0.25,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.backbone_config.backbone, config.backbone_config.out_indices) == ("resnet50", [2, 3, 4])
    assert DinoDetrConfig(num_feature_levels=5).backbone_config.out_indices == [1, 2, 3, 4]
    assert DinoDetrConfig(backbone="resnet101").backbone_config.backbone == "resnet101"


@pytest.mark.parametrize("shared", [True, False])
def test_a_new_model_finds_every_class_with_one_in_a_hundred_and_moves_no_box(shared: bool) -> None:
    config = tiny.config("dino_detr", share_prediction_heads=shared)
    model = transformers.AutoModelForObjectDetection.from_config(config).eval()
    decoder = model.model.decoder
    assert len(decoder.class_embed) == len(decoder.bbox_embed) == (1 if shared else tiny.NUM_LAYERS)
    for head in (*decoder.class_embed, model.model.enc_class_embed):
        torch.testing.assert_close(head.bias.sigmoid(), torch.full((tiny.NUM_CLASSES,), 0.01))
    for head in (*decoder.bbox_embed, model.model.enc_bbox_embed):
        assert not head.layers[-1].weight.any() and not head.layers[-1].bias.any()
    output = run(model, tiny.batch(128), labels=False)
    boxes = output.init_reference_points.clamp(1e-3, 1 - 1e-3)[:, None].expand(-1, tiny.NUM_LAYERS, -1, -1)
    torch.testing.assert_close(output.intermediate_reference_points, boxes)


def test_every_deformable_attention_of_a_new_model_looks_into_all_directions() -> None:
    model = transformers.AutoModelForObjectDetection.from_config(tiny.config("dino_detr")).model
    ring = model.encoder.layers[0].self_attn.sampling_offsets.bias
    assert ring.view(4, -1, 2).mean((0, 1)).abs().max() < 1e-5 and ring.abs().max() == 4
    attentions = [layer.self_attn for layer in model.encoder.layers]
    for attention in attentions + [layer.encoder_attn for layer in model.decoder.layers]:
        assert not attention.sampling_offsets.weight.any() and not attention.attention_weights.weight.any()
        torch.testing.assert_close(attention.sampling_offsets.bias, ring)


def xavier(layer: torch.nn.Module, rows: int = 1) -> float:
    """Standard deviation of Xavier's uniform distribution; `rows` times as many outputs."""
    outputs, inputs = layer.weight.shape[:2]
    cells = layer.weight[0, 0].numel()  # of a convolution
    return (2 / ((rows * outputs + inputs) * cells)) ** 0.5


def own(layer: torch.nn.Module) -> float:
    """Standard deviation of PyTorch's own initial weights and biases of a linear layer."""
    return (layer.in_features * 3) ** -0.5


def test_a_new_model_starts_as_the_original_does() -> None:
    config = tiny.config("dino_detr", 64, encoder_ffn_dim=256, decoder_ffn_dim=256, num_queries=100)
    model = transformers.AutoModelForObjectDetection.from_config(config).model
    first, last = model.encoder.layers[0], model.decoder.layers[-1]
    expected: list[tuple[Tensor, float]] = []
    for layer in (first.mlp.fc1, first.mlp.fc2, last.mlp.fc1, last.mlp.fc2, *model.decoder.ref_point_head.layers):
        expected += [(layer.weight, xavier(layer)), (layer.bias, own(layer))]
    expected += [(model.enc_output.weight, xavier(model.enc_output)), (model.enc_output.bias, own(model.enc_output))]
    attention = last.self_attn
    for name, rows in (("q_proj", 3), ("k_proj", 3), ("v_proj", 3), ("o_proj", 1)):
        layer = getattr(attention, name)  # the three are one matrix in the original
        expected += [(layer.weight, xavier(layer, rows)), (layer.bias, 0.0)]
    for module in (first.self_attn, last.encoder_attn):
        for layer in (module.value_proj, module.output_proj):
            expected += [(layer.weight, xavier(layer)), (layer.bias, 0.0)]
    for projection, _ in model.input_proj:
        expected += [(projection.weight, xavier(projection)), (projection.bias, 0.0)]
    for head in (model.enc_bbox_embed, *model.decoder.bbox_embed):
        expected += [(layer.weight, own(layer)) for layer in head.layers[:-1]]
        expected += [(layer.bias, own(layer)) for layer in head.layers[:-1]]
    expected += [(head.weight, own(head)) for head in (model.enc_class_embed, *model.decoder.class_embed)]
    expected += [(model.query_content.weight, xavier(model.query_content))]  # after normal_, all of it is reset there
    expected += [(model.denoising_class_content.weight, 1.0), (model.level_embed, 1.0)]
    for weight, deviation in expected:
        count = weight.numel() ** 0.5
        assert weight.mean().abs() <= 4.5 * deviation / count, weight.shape
        assert abs(weight.std() - deviation) <= 4.5 * deviation / count, (weight.shape, weight.std(), deviation)
        assert weight.abs().max() <= deviation * 3**0.5 * 1.001 or deviation == 1.0  # uniform, but for embeddings


@pytest.mark.parametrize("levels", [5, 6])
def test_levels_come_from_the_backbone_s_stages_then_from_its_last_then_from_each_other(levels: int) -> None:
    backbone = tiny.config("detr").backbone_config
    assert len(backbone.out_features) == 4
    model = tiny.build("dino_detr", num_feature_levels=levels, backbone_config=backbone).train()
    projected: list[tuple[Tensor, Tensor]] = []
    for projection in model.model.input_proj:
        projection.register_forward_hook(lambda _, args, output: projected.append((args[0], output)))
    inputs = tiny.batch(128, padded=True)
    with asked(model) as arguments:
        output = run(model, inputs)
    stages = [values for values, _ in model.model.backbone(inputs["pixel_values"], inputs["pixel_mask"])]
    read, made = zip(*projected, strict=True)
    for found, expected in zip(read, [*stages, stages[-1], *made[4:-1]], strict=True):
        torch.testing.assert_close(found, expected)
    assert arguments["spatial_shapes_list"] == [(side, side) for side in (32, 16, 8, 4, 2, 1)[:levels]]
    assert output.loss.isfinite()


def test_an_image_with_fewer_cells_than_queries_is_refused(build: Build) -> None:
    model = build("dino_detr", num_queries=86)
    run(model, tiny.batch(72), labels=False)  # 9 x 9 + 5 x 5 + ...
    with pytest.raises(
        ValueError, match="86 queries cannot be selected from the 85 cells of these images: use larger"
    ):
        run(model, tiny.batch(64))
