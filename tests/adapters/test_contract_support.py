"""Precision, checkpointing and compilation of every family, and what some families do unlike the others."""

from __future__ import annotations

import types

import pytest
import torch
import transformers
from torch import Tensor

from hf_detrkd.adapters import adapter_for, spec_for
from hf_detrkd.methods.decoding import decode_together
from hf_detrkd.structures.outputs import ObjectQueries
from tests import tiny
from tests.adapters.contract import (
    assert_same,
    foreign,
    gradients,
    inputs_for,
    least_field,
    run,
    some_loss,
    ways_to_ask,
)


CHECKPOINTED = ["detr", "conditional_detr", "deformable_detr/plain", "deformable_detr/two_stage"]


def test_bf16_autocast_keeps_values_and_gradients_of_extra_passes_finite(askable_adapter):
    adapter = askable_adapter
    adapter.model.train()
    for fields in ways_to_ask(adapter.spec):
        with torch.autocast("cpu", torch.bfloat16):
            output = run(adapter, inputs_for(adapter, padded=True), with_labels=True)
            layers = output.decode(foreign(adapter.spec, fields=fields))
        assert all(layer.boxes.dtype == torch.float32 for layer in (*layers, *output.layers))
        assert all(layer.logits.isfinite().all() and layer.boxes.isfinite().all() for layer in layers)
        assert output.loss.dtype == torch.float32
        found = gradients(adapter.model, output.loss + some_loss(layers))
        assert all(gradient is None or gradient.isfinite().all() for gradient in found.values())


def test_a_model_without_an_adapter_is_refused_with_the_list_of_known_ones():
    config = transformers.ViTConfig()
    message = "No adapter for model type 'vit': choose a model of one of conditional_detr, d_fine, dab-detr, deformabl"
    with pytest.raises(ValueError, match=message):
        spec_for(config)
    with pytest.raises(ValueError, match=message):
        adapter_for(types.SimpleNamespace(config=config))


def test_backbone_parameters_are_those_of_the_backbone_and_no_others(adapter):
    found, base = {name for name, _ in adapter.backbone_parameters()}, adapter.body
    backbone = {
        "deimv2": lambda: base.conv_encoder.model,
        "lw_detr": lambda: base.backbone.backbone,
        "rf_detr": lambda: base.backbone.backbone,
        "yolos": lambda: base,
    }.get(adapter.spec.family, lambda: base.backbone)()
    own = {id(parameter) for parameter in backbone.parameters()}
    assert found == {name for name, parameter in adapter.model.named_parameters() if id(parameter) in own} != set()


def test_yolos_answers_its_own_tokens_alone_and_says_why(build):
    adapter = adapter_for(build("yolos"))
    output = run(adapter, inputs_for(adapter))
    assert not adapter.spec.query_fields and not output.queries.fields and len(output.layers) == 1
    assert output.features["encoder"][0].values.shape == output.features["neck"][0].values.shape == (2, 32, 8, 8)
    with pytest.raises(ValueError, match="yolos cannot decode external queries: it has no decoder"):
        output.decode(ObjectQueries(boxes=tiny.random_boxes(2, 3)))


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_activation_checkpointing_changes_no_gradient_of_either_pass(build, name):
    def outcome(checkpointed: bool) -> dict[str, Tensor | None]:
        model = build(name).train().requires_grad_(True)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        adapter = adapter_for(model)
        output = run(adapter, inputs_for(adapter), with_labels=True)
        fields = None, frozenset({least_field(adapter.spec)})
        sets = [foreign(adapter.spec, count, names, seed=count) for names in fields for count in (3, 5)]
        together = [layer for layers in decode_together(output.decode, sets) for layer in layers]
        return gradients(model, output.loss + some_loss(output.decode(foreign(adapter.spec))) + some_loss(together))

    plain, checkpointed = outcome(False), outcome(True)
    for key, gradient in plain.items():
        assert (gradient is None) == (checkpointed[key] is None), key
        if gradient is not None:
            torch.testing.assert_close(checkpointed[key], gradient, atol=5e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_forward_pass_compiles_without_a_graph_break_after_a_pass_of_ours(adapter):
    inputs = {k: v for k, v in inputs_for(adapter, padded=True).items() if k != "labels"}
    adapter.model.eval()
    torch._dynamo.reset()  # families share code, and dynamo counts how often it compiled each piece
    with torch.no_grad():
        expected = adapter(inputs["pixel_values"], inputs.get("pixel_mask"))[0].layers[-1]
        found = torch.compile(adapter.model, backend="eager", fullgraph=True)(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.pred_boxes, expected.boxes, atol=1e-5, rtol=1e-5)


def test_deimv2_s_lite_encoder_and_dinov3_backbone_are_read_right(build):
    lite = adapter_for(build("deimv2", encoder_type="lite"))
    output = run(lite, inputs_for(lite, 128))
    found = {place: tuple(level.values.shape[1] for level in maps) for place, maps in output.features.items()}
    assert found["encoder"] == lite.spec.features["encoder"]
    assert set(found["neck"]) == set(lite.spec.features["neck"])
    vit = transformers.DINOv3ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=16,
        num_register_tokens=1,
        out_features=["stage1", "stage2", "stage4"],
        apply_layernorm=False,
        reshape_hidden_states=True,
    )
    config = tiny.config("deimv2", backbone_config=vit, encoder_in_channels=[32, 32, 32])
    model = transformers.AutoModelForObjectDetection.from_config(config).eval()
    adapter = adapter_for(model)
    backbone = {name for name, _ in adapter.backbone_parameters()}
    own = {id(p) for p in model.model.conv_encoder.backbone.parameters()}
    assert backbone == {name for name, p in model.named_parameters() if id(p) in own} != set()
    output = run(adapter, inputs_for(adapter, 128))
    assert_same(output.decode(output.queries), output.layers)
