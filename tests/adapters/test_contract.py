"""Contract of a forward pass, checked on every family, which joins by its line in `tiny_configs.py`."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from hf_detrkd.adapters import DetectorAdapter, adapter_for, spec_for
from hf_detrkd.structures.outputs import Predictions
from hf_detrkd.structures.targets import Targets
from tests import tiny
from tests.adapters.contract import (
    assert_same,
    both_modes,
    differ,
    foreign,
    inputs_for,
    run,
    run_model,
    seen_by,
)


def run_denoising_rows(adapter: DetectorAdapter, output: Any) -> int:
    return output.denoising_meta_values["dn_num_split"][0] if adapter.spec.family in tiny.HYBRID else 0


@both_modes
@pytest.mark.parametrize(("size", "padded"), [(64, False), (128, True), ((96, 128), True)])
def test_a_pass_gives_what_the_model_gives(adapter, size, padded, training):
    adapter.model.train(training)
    inputs = inputs_for(adapter, size, padded)
    with torch.no_grad():
        expected = run_model(adapter, inputs, training)
        last = run(adapter, inputs, training).layers[-1]
    start = run_denoising_rows(adapter, expected) if training else 0  # own rows lie behind them, the first group first
    own = slice(start, start + tiny.NUM_QUERIES)
    torch.testing.assert_close(last.logits, expected.logits[:, own], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last.boxes, expected.pred_boxes[:, own], atol=1e-5, rtol=1e-5)


def test_each_layer_answers_like_the_model_cut_off_behind_it(askable_adapter):
    adapter = askable_adapter
    inputs = inputs_for(adapter, padded=True)
    layers, decoder = run(adapter, inputs).layers, adapter.decoder
    whole = decoder.layers
    for depth, layer in enumerate(layers, 1):
        decoder.layers = whole[:depth]
        decoder.num_layers, decoder.eval_idx = depth, depth - 1  # where DAB-DETR and D-FINE stop
        expected = run_model(adapter, inputs)
        torch.testing.assert_close(layer.logits, expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.boxes, expected.pred_boxes, atol=1e-5, rtol=1e-5)
    assert all(differ([a], [b]) for a, b in combinations(layers, 2))


@pytest.mark.parametrize("name", ["detr", "table-transformer"])
def test_a_model_with_auxiliary_loss_in_its_config_is_read_as_it_computes(build, name):
    adapter = adapter_for(build(name, auxiliary_loss=True))
    inputs = inputs_for(adapter, padded=True)
    output, expected = run(adapter, inputs), run_model(adapter, inputs, with_labels=True)
    auxiliary = [Predictions(entry["logits"], entry["pred_boxes"]) for entry in expected.auxiliary_outputs]
    for layer, other in zip(
        output.layers, [*auxiliary, Predictions(expected.logits, expected.pred_boxes)], strict=True
    ):
        torch.testing.assert_close(layer.logits, other.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.boxes, other.boxes, atol=1e-5, rtol=1e-5)
    assert_same(output.decode(output.queries), output.layers)


@pytest.mark.parametrize(("width", "depth"), [(32, 2), (64, 4)])
def test_the_spec_from_a_config_alone_describes_the_pass(build, askable, width, depth):
    family, adapter = askable, adapter_for(build(askable, width, decoder_layers=depth))
    output, spec = run(adapter, inputs_for(adapter)), adapter.spec
    assert spec == spec_for(adapter.model.config)
    assert (spec.family, spec.width, spec.num_layers) == (family, width, depth)
    assert spec.num_queries == tiny.NUM_QUERIES and spec.num_classes == tiny.NUM_CLASSES
    assert spec.query_fields <= output.queries.fields
    for layers, count in ((output.layers, spec.num_queries), (output.decode(foreign(spec)), 8)):
        assert len(layers) == spec.num_layers
        for layer in layers:
            assert layer.activation == spec.activation and layer.num_classes == spec.num_classes
            assert layer.boxes.shape == (2, count, 4) and layer.hidden_states.shape == (2, count, spec.width)
            assert layer.logits.shape == (2, count, spec.num_classes + (spec.activation == "softmax"))


def test_no_object_is_the_last_column_and_has_no_score(adapter):
    output = run(adapter, inputs_for(adapter))
    scores = output.layers[-1].scores()
    assert scores.shape == (2, tiny.NUM_QUERIES, tiny.NUM_CLASSES)
    if adapter.spec.activation == "softmax":
        head = adapter.model.class_labels_classifier
        with torch.no_grad():
            (head.layers[-1] if adapter.spec.family == "yolos" else head).bias[-1] += 50.0
        assert run(adapter, inputs_for(adapter)).layers[-1].scores().max() < 1e-6 < scores.min()


@both_modes
def test_denoising_rows_stay_out_of_the_answer(askable_adapter, training):
    adapter = askable_adapter
    adapter.model.train(training)
    with seen_by(adapter.decoder) as calls:
        output = run(adapter, inputs_for(adapter), with_labels=True)
    asked = calls[0]["inputs_embeds"].shape[1]
    denoises, groups = adapter.spec.family in tiny.DENOISING and training, 1
    if adapter.spec.family in tiny.GROUPED and training:
        groups = tiny.NUM_GROUPS
    assert asked == groups * tiny.NUM_QUERIES + (2 * tiny.NUM_DENOISING if denoises else 0)
    assert all(layer.logits.shape[1] == layer.boxes.shape[1] == tiny.NUM_QUERIES for layer in output.layers)
    assert all(getattr(output.queries, name).shape[1] == tiny.NUM_QUERIES for name in output.queries.fields)


def test_the_loss_comes_with_targets_only_and_is_the_sum_of_its_parts(adapter):
    inputs = inputs_for(adapter)
    output, losses = adapter(inputs["pixel_values"], targets=Targets.from_labels(inputs["labels"]))
    torch.testing.assert_close(output.loss, sum(losses.values()))
    assert {"class", "box", "giou"} <= losses.keys()
    assert run(adapter, inputs).loss is None


def test_a_pass_leaves_no_hook_behind_even_if_it_fails(adapter):
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter.model.modules())

    run(adapter, inputs_for(adapter))  # transformers leaves hooks of its own with the first pass
    before = hooks()
    run(adapter, inputs_for(adapter))
    with pytest.raises(ValueError, match="channel dimension"):
        adapter(torch.randn(2, 5, 64, 64))
    assert hooks() == before
