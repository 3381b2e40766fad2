"""Contract of decoding external queries, checked on every family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_detrkd.adapters import adapter_for
from hf_detrkd.structures.outputs import DetectorOutput, ObjectQueries, Predictions
from tests import tiny
from tests.adapters.contract import (
    assert_same,
    both_modes,
    differ,
    foreign,
    gradients,
    inputs_for,
    least_field,
    run,
    run_model,
    some_loss,
    ways_to_ask,
)


@both_modes
@pytest.mark.parametrize("padded", [False, True])
def test_own_queries_asked_again_give_the_same_answer_and_gradient(askable_adapter, padded, training):
    adapter = askable_adapter
    adapter.model.train(training)
    output = run(adapter, inputs_for(adapter, padded=padded), with_labels=training)
    again = output.decode(output.queries)
    assert_same(again, output.layers)
    first, second = (gradients(adapter.model, some_loss(layers)) for layers in (output.layers, again))
    norm = max(gradient.abs().max() for gradient in first.values() if gradient is not None)
    for name, gradient in first.items():
        assert (gradient is None) == (second[name] is None), name
        if gradient is not None:
            assert (second[name] - gradient).abs().max() < 1e-3 * norm, name  # float32 through a whole backbone


def test_the_memory_is_projected_once(askable_adapter, monkeypatch):
    """And each pass finds the projections of its own model call."""
    adapter, seen = askable_adapter, []
    projections = [m for n, m in adapter.decoder.named_modules() if n.rpartition(".")[2] == "value_proj"]
    plain = torch.nn.Linear.forward

    def count(self, states):
        seen.extend([self] * (self in projections))
        return plain(self, states)

    monkeypatch.setattr(torch.nn.Linear, "forward", count)
    first, second = (run(adapter, inputs_for(adapter, size)) for size in (128, 96))
    assert len(seen) == 2 * len(projections)
    answers = [output.decode(foreign(adapter.spec)) for output in (first, second)]
    assert len(seen) == 2 * len(projections)
    assert differ(*answers)
    assert not any("forward" in vars(module) for module in projections)


@both_modes
def test_own_places_without_content_find_the_own_content_again(askable_adapter, training):
    adapter = askable_adapter
    adapter.model.train(training)
    output = run(adapter, inputs_for(adapter, padded=True), with_labels=training)
    fields = frozenset({least_field(adapter.spec), "rows"})
    assert_same(output.decode(output.queries.detach().select(fields)), output.layers)


@pytest.mark.parametrize("count", [1, 7, 300])
def test_any_number_of_foreign_queries_through_any_accepted_fields(askable_adapter, count):
    adapter = askable_adapter
    output = run(adapter, inputs_for(adapter))
    for fields in ways_to_ask(adapter.spec):
        layers = output.decode(foreign(adapter.spec, count, fields))
        assert len(layers) == tiny.NUM_LAYERS
        for layer in layers:
            assert layer.logits.shape[:2] == layer.boxes.shape[:2] == (2, count)
            assert layer.logits.isfinite().all() and layer.boxes.isfinite().all()


def test_every_accepted_field_makes_a_difference(askable_adapter):
    adapter = askable_adapter
    output, whole = run(adapter, inputs_for(adapter)), foreign(adapter.spec)
    answer, other = output.decode(whole), foreign(adapter.spec, seed=9)
    for name in adapter.spec.query_fields:
        assert differ(output.decode(with_field(whole, name, getattr(other, name))), answer), name


def with_field(queries: ObjectQueries, name: str, value: Tensor) -> ObjectQueries:
    return ObjectQueries(**{field: getattr(queries, field) for field in queries.fields} | {name: value})


@both_modes
def test_foreign_queries_leave_detections_loss_and_gradients_alone(build, askable, training):
    family = askable

    def outcome(asked: bool) -> tuple[DetectorOutput, dict[str, Tensor | None]]:
        adapter = adapter_for(build(family).train(training).requires_grad_(True))
        output = run(adapter, inputs_for(adapter, padded=True), with_labels=True)
        if asked:
            output.decode(foreign(adapter.spec, 300))
            output.decode(foreign(adapter.spec, 1))
        return output, gradients(adapter.model, output.loss)

    (alone, expected), (output, found) = outcome(False), outcome(True)
    for layer, other in zip(output.layers, alone.layers, strict=True):
        assert torch.equal(layer.logits, other.logits) and torch.equal(layer.boxes, other.boxes)
    assert torch.equal(output.loss, alone.loss)
    for name, gradient in expected.items():
        assert (gradient is None and found[name] is None) or torch.equal(gradient, found[name]), name


def test_queries_never_see_each_other_across_calls(askable_adapter):
    adapter = askable_adapter
    output = run(adapter, inputs_for(adapter))
    queries, others = foreign(adapter.spec, 5), foreign(adapter.spec, 6, seed=9)
    alone = output.decode(queries)
    output.decode(others)
    assert_same(output.decode(queries), alone)
    together = ObjectQueries(
        **{name: torch.cat([getattr(queries, name), getattr(others, name)], 1) for name in queries.fields}
    )
    rows = [Predictions(a.logits[:, :5], a.boxes[:, :5], a.hidden_states[:, :5]) for a in output.decode(together)]
    assert differ(rows, alone)


def test_each_pass_is_asked_about_its_own_images(askable_adapter):
    adapter = askable_adapter
    first, queries = run(adapter, inputs_for(adapter)), foreign(adapter.spec)
    answer = first.decode(queries)
    second = run(adapter, inputs_for(adapter, 64, seed=5))
    assert differ(second.decode(queries), answer)
    assert_same(first.decode(queries), answer)


@both_modes
def test_decoding_touches_no_buffer_and_a_training_step_updates_statistics_once(build, askable, training):
    family = askable
    adapter, plain = (adapter_for(build(family).train(training)) for _ in range(2))
    inputs = inputs_for(adapter)
    run_model(plain, inputs, with_labels=True)
    before = {name: buffer.clone() for name, buffer in adapter.model.named_buffers()}
    output = run(adapter, inputs, with_labels=True)
    for count in (3, 9):
        output.decode(foreign(adapter.spec, count))
    expected = dict(plain.model.named_buffers())
    for name, buffer in adapter.model.named_buffers():
        torch.testing.assert_close(buffer, expected[name], atol=0, rtol=0)
        assert training or torch.equal(buffer, before[name]), name
        if name.endswith("num_batches_tracked"):
            assert buffer == int(training), name


def test_gradients_of_a_foreign_query_reach_backbone_neck_encoder_decoder_and_heads(askable_adapter):
    adapter = askable_adapter
    adapter.model.train()
    output = run(adapter, inputs_for(adapter, padded=True), with_labels=True)
    queries = foreign(adapter.spec, fields=ways_to_ask(adapter.spec)[0])
    by_own, by_foreign = (
        {name for name, gradient in gradients(adapter.model, loss).items() if gradient is not None and gradient.any()}
        for loss in (some_loss(output.layers), some_loss(output.decode(queries)))
    )
    base, backbone = adapter.model.model, adapter.backbone_parameters()
    parts = {
        "neck": adapter.necks(),
        "encoder": [base.encoder] if hasattr(base, "encoder") else [],
        "decoder": base.decoder.layers,
    }
    wanted = {name for name, _ in backbone} & by_own
    assert wanted and wanted <= by_foreign
    names = {id(parameter): name for name, parameter in adapter.model.named_parameters()}
    for part, modules in parts.items():
        wanted = {names[id(parameter)] for module in modules for parameter in module.parameters()} & by_own
        assert (wanted or not modules) and wanted <= by_foreign, (part, wanted - by_foreign)
    heads = {name for name in by_own if "class_" in name or "bbox_" in name}
    assert any("class_" in name for name in heads) and any("bbox_" in name for name in heads) and heads <= by_foreign


def test_boxes_are_inside_the_unit_square(askable_adapter):
    adapter = askable_adapter
    output = run(adapter, inputs_for(adapter, padded=True))
    slack = 2 if adapter.spec.family in tiny.UNBOUNDED else 0  # these random weights leave the image by up to 1.1
    for layer in (*output.layers, *output.decode(foreign(adapter.spec, 300))):
        assert layer.boxes.min() >= -slack and layer.boxes.max() <= 1 + slack
    for name in output.queries.fields & {"boxes", "points"}:
        assert getattr(output.queries, name).min() >= -slack and getattr(output.queries, name).max() <= 1 + slack
