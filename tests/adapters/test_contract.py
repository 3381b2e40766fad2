"""What every adapter promises, checked on every family. A new family joins by its line in `tests/tiny.py`."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from itertools import chain, combinations
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_detrkd.adapters import ADAPTERS, DetectorAdapter, adapter_for, spec_for
from hf_detrkd.adapters.rt_detr import rows_at
from hf_detrkd.outputs import DetectorOutput, DetectorSpec, ObjectQueries, Predictions, Targets
from hf_detrkd.questions import ask_together
from tests import tiny


Layers = Sequence[Predictions]
SPECS = {name: spec_for(tiny.config(name)) for name in tiny.FAMILIES}
ASKABLE = tiny.ASKABLE
PLACED = [name for name, spec in SPECS.items() if spec.query_fields & {"boxes", "points"}]
MASKING = [name for name in tiny.FAMILIES if ADAPTERS[tiny.config(name).model_type].uses_pixel_mask]
DENOISING, GROUPED = tiny.DENOISING, tiny.GROUPED
TWO_STAGE = ["deformable_detr/two_stage", *tiny.HYBRID]
both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@pytest.fixture
def adapter(build: Callable[..., transformers.PreTrainedModel], family: str) -> DetectorAdapter:
    return adapter_for(build(family).requires_grad_(True))


@pytest.fixture
def askable_adapter(build: Callable[..., transformers.PreTrainedModel], askable: str) -> DetectorAdapter:
    return adapter_for(build(askable).requires_grad_(True))


def inputs_for(
    adapter: DetectorAdapter, size: int | tuple[int, int] = 128, padded: bool = False, **options: Any
) -> dict:
    """Images for this family: a padded batch comes without a mask where the family takes none."""
    return tiny.batch(size, padded=padded, masked=padded and adapter.uses_pixel_mask, **options)


def run(adapter: DetectorAdapter, inputs: dict[str, Any], with_labels: bool = False) -> DetectorOutput:
    targets = Targets.from_labels(inputs["labels"]) if with_labels else None
    torch.manual_seed(0)  # denoising draws random numbers
    return adapter(inputs["pixel_values"], inputs.get("pixel_mask"), targets)[0]


def run_model(adapter: DetectorAdapter, inputs: dict[str, Any], with_labels: bool = False) -> Any:
    torch.manual_seed(0)
    return adapter.model(**(inputs if with_labels else {k: v for k, v in inputs.items() if k != "labels"}))


def run_denoising_rows(adapter: DetectorAdapter, output: Any) -> int:
    return output.denoising_meta_values["dn_num_split"][0] if adapter.spec.family in tiny.HYBRID else 0


def least_field(spec: DetectorSpec) -> str:
    """The field without which a family cannot be asked."""
    return next(name for name in ("boxes", "points", "position") if name in spec.query_fields)


def ways_to_ask(spec: DetectorSpec) -> list[frozenset[str]]:
    """Every set of fields that a family can be asked with."""
    least = least_field(spec)
    rest = sorted(spec.query_fields - {least})
    subsets = chain.from_iterable(combinations(rest, size) for size in range(len(rest) + 1))
    return [frozenset({least, *subset}) for subset in subsets]


def foreign(spec: DetectorSpec, count: int = 8, fields: frozenset[str] | None = None, seed: int = 1) -> ObjectQueries:
    """Random queries for a batch of two."""
    generator = torch.Generator().manual_seed(seed)
    boxes = tiny.random_boxes(2, count, generator=generator)
    content, position = torch.randn(2, 2, count, spec.width, generator=generator)
    queries = ObjectQueries(content=content, position=position, points=boxes[..., :2], boxes=boxes)
    return queries.select(spec.query_fields if fields is None else fields)


def assert_same(layers: Layers, others: Layers) -> None:
    for layer, other in zip(layers, others, strict=True):
        torch.testing.assert_close(layer.logits, other.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.boxes, other.boxes, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.hidden_states, other.hidden_states, atol=1e-4, rtol=1e-4)


def differ(layers: Layers, others: Layers) -> bool:
    pairs = zip(layers, others, strict=True)
    return all((a.logits - b.logits).abs().max() > 1e-3 and (a.boxes - b.boxes).abs().max() > 1e-4 for a, b in pairs)


def some_loss(layers: Layers) -> Tensor:
    """A loss that weighs every logit and coordinate of every layer differently."""
    generator = torch.Generator().manual_seed(2)
    values = [torch.cat([layer.logits, layer.boxes], -1) for layer in layers]
    return sum((value * torch.randn(value.shape, generator=generator)).sum() for value in values)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return dict(zip(names, found, strict=True))


@contextmanager
def seen_by(module: nn.Module):
    """Keyword arguments of every call of a module."""
    calls: list[dict[str, Any]] = []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    yield calls
    handle.remove()


# --- the forward pass ------------------------------------------------------------------------------------------------


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
    denoises, groups = adapter.spec.family in DENOISING and training, 1
    if adapter.spec.family in GROUPED and training:
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


# --- asking again ----------------------------------------------------------------------------------------------------


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
    for layer in (*output.layers, *output.decode(foreign(adapter.spec, 300))):
        slack = 100 if adapter.spec.family in tiny.UNBOUNDED else 0
        assert layer.boxes.min() >= -slack and layer.boxes.max() <= 1 + slack
    for name in output.queries.fields & {"boxes", "points"}:
        assert getattr(output.queries, name).min() >= -slack and getattr(output.queries, name).max() <= 1 + slack


@pytest.mark.parametrize("name", PLACED)
def test_the_decoder_looks_where_a_foreign_query_is_placed(build, name):
    adapter = adapter_for(build(name))
    output, field = run(adapter, inputs_for(adapter)), least_field(adapter.spec)
    for fields in ways_to_ask(adapter.spec):
        queries = foreign(adapter.spec, fields=fields)
        seen = place_seen(adapter, lambda queries=queries: output.decode(queries))
        torch.testing.assert_close(seen, getattr(queries, field), atol=1e-5, rtol=0)


def place_seen(adapter: DetectorAdapter, ask: Callable[[], Any]) -> Tensor:
    """Where the first decoder layer looks, in [0, 1]."""
    if adapter.spec.family in ("conditional_detr", "dab-detr"):
        found: list[Any] = []
        handle = adapter.decoder.register_forward_hook(lambda module, args, output: found.append(output))
        ask()
        handle.remove()
        points = found[0].reference_points
        return points.transpose(0, 1) if adapter.spec.family == "conditional_detr" else points[0]
    layer = adapter.decoder.layers[0]
    with seen_by(layer.cross_attn if adapter.spec.family in GROUPED else layer.encoder_attn) as calls:
        ask()
    return calls[0]["reference_points"][:, :, 0]


@pytest.mark.parametrize("name", ["conditional_detr", "deformable_detr/plain", "deformable_detr/refine"])
def test_a_box_asks_a_family_of_points_at_its_centre(build, name):
    adapter = adapter_for(build(name))
    output, boxes = run(adapter, inputs_for(adapter)), tiny.random_boxes(2, 5)
    assert_same(output.decode(ObjectQueries(boxes=boxes)), output.decode(ObjectQueries(points=boxes[..., :2])))


@pytest.mark.parametrize("name", ["deformable_detr/plain", "deformable_detr/two_stage"])
def test_places_are_in_the_frame_of_the_image_and_not_of_the_padded_canvas(build, name):
    adapter = adapter_for(build(name))
    output, queries = run(adapter, inputs_for(adapter, padded=True)), foreign(adapter.spec)
    with seen_by(adapter.decoder.layers[0].encoder_attn) as calls:
        output.decode(queries)
    place, seen = getattr(queries, least_field(adapter.spec)), calls[0]["reference_points"][:, :, 0]
    torch.testing.assert_close(seen[0], place[0])
    torch.testing.assert_close(seen[1], place[1] * 0.75)


def test_queries_that_a_family_cannot_place_are_refused(askable_adapter):
    adapter = askable_adapter
    output, field = run(adapter, inputs_for(adapter)), least_field(adapter.spec)
    with pytest.raises(ValueError, match=rf"{adapter.spec.family} queries need `{field}`, got only \['content'\]"):
        output.decode(ObjectQueries(content=torch.randn(2, 4, 32)))


# --- padding and features --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKING)
def test_what_stands_in_a_masked_cell_changes_no_prediction(build, name):
    adapter = adapter_for(build(name))
    inputs, queries = inputs_for(adapter, padded=True), foreign(adapter.spec)
    clean = run(adapter, inputs)
    padding = [level.padding for level in clean.features["neck"]]
    assert any(mask.any() for mask in padding) and not padding[0][0].any()

    def answers(masks: list[Tensor]) -> Layers:
        left = iter(masks)

        def spoil(module: nn.Module, args: tuple, output: Any) -> Any:
            if isinstance(output, Tensor):
                return output + 10 * torch.randn_like(output) * next(left)[:, None]
            if isinstance(output, list):
                return [spoil(module, args, item) for item in output]
            return (spoil(module, args, output[0]), output[1])

        handles = [neck.register_forward_hook(spoil) for neck in adapter.necks()]
        output = run(adapter, inputs)
        for handle in handles:
            handle.remove()
        return (*output.layers, *output.decode(queries))

    expected = (*clean.layers, *clean.decode(queries))
    assert_same(answers(padding), expected)
    assert differ(answers([~mask for mask in padding]), expected)


@pytest.mark.parametrize("name", MASKING)
def test_a_mask_of_ones_is_no_mask(build, name):
    adapter = adapter_for(build(name))
    with_mask, without = (run(adapter, tiny.batch(128, masked=masked)) for masked in (True, False))
    assert_same(with_mask.layers, without.layers)
    levels = chain(*with_mask.features.values())
    assert not any(level.padding.any() for level in levels)
    assert all(level.padding is None for level in chain(*without.features.values()))


@pytest.mark.parametrize("name", sorted(set(tiny.FAMILIES) - set(MASKING)))
def test_a_family_that_takes_no_mask_refuses_one(build, name):
    adapter = adapter_for(build(name))
    with pytest.raises(ValueError, match=f"{name} sees padding as image, but the batch is padded: resize"):
        run(adapter, tiny.batch(64, padded=True))


@both_modes
@pytest.mark.parametrize("size", [64, (64, 128)])
def test_feature_maps_are_what_the_encoder_got_and_what_the_decoder_reads(askable_adapter, size, training):
    adapter = askable_adapter
    adapter.model.train(training)
    entered: list[Tensor] = []
    handles = [
        neck.register_forward_hook(
            lambda module, args, output: entered.extend(m.clone() for m in adapter.neck_maps(output))
        )
        for neck in adapter.necks()
    ]
    with seen_by(adapter.decoder) as calls:
        output = run(adapter, inputs_for(adapter, size, padded=True), with_labels=training)
    for handle in handles:
        handle.remove()
    assert {place: tuple(level.values.shape[1] for level in maps) for place, maps in output.features.items()} == (
        adapter.spec.features
    )
    for level, values in zip(output.features["neck"], entered, strict=True):
        assert torch.equal(level.values, values)
    memory, start = calls[0]["encoder_hidden_states"], 0
    for level in output.features["encoder"]:
        height, width = level.values.shape[-2:]
        assert width == height if size == 64 else width == 2 * height
        for y, x in ((0, 0), (0, width - 1), (height - 1, 0), (height // 2, width // 2)):
            assert torch.equal(level.values[:, :, y, x], memory[:, start + y * width + x])
        start += height * width
    assert start == memory.shape[1]


@pytest.mark.parametrize("name", MASKING)
def test_padding_flags_are_those_of_the_decoder(build, name):
    adapter = adapter_for(build(name))
    with seen_by(adapter.decoder) as calls:
        output = run(adapter, inputs_for(adapter, padded=True))
    for place in ("neck", "encoder"):
        flags = torch.cat([level.padding.flatten(1) for level in output.features[place]], 1)
        name_of_mask = "memory_key_padding_mask" if name == "dab-detr" else "encoder_attention_mask"
        assert torch.equal(flags, ~calls[0][name_of_mask].bool())
    stride = output.features["encoder"][0]
    cells = stride.padding.shape[-1] * 3 // 4
    assert stride.padding[1, cells:].all() and stride.padding[1, :, cells:].all()
    assert not stride.padding[1, :cells, :cells].any() and not stride.padding[0].any()


# --- two-stage detectors ---------------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("name", TWO_STAGE)
def test_rows_point_at_the_tokens_that_proposed_the_own_queries(build, name, training):
    adapter = adapter_for(build(name).train(training))
    proposed = []
    handle = adapter.model.model.register_forward_hook(lambda module, args, output: proposed.append(output))
    output = run(adapter, inputs_for(adapter, (64, 128), padded=True), with_labels=training)
    handle.remove()
    boxes = proposed[0].enc_outputs_coord_logits.sigmoid()
    image = torch.arange(2)[:, None]
    torch.testing.assert_close(boxes[image, output.queries.rows], output.queries.boxes, atol=1e-6, rtol=0)
    if name in DENOISING:
        memory = torch.cat([level.values.flatten(2) for level in output.features["encoder"]], -1).mT
        content = adapter.model.model.enc_output(memory[image, output.queries.rows])
        torch.testing.assert_close(content, output.queries.content, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(tiny.FAMILIES) - set(TWO_STAGE)))
def test_a_one_stage_detector_has_no_rows(build, name):
    adapter = adapter_for(build(name))
    assert run(adapter, inputs_for(adapter)).queries.rows is None


@pytest.mark.parametrize("shapes", [[(8, 8), (4, 4), (2, 2)], [(6, 10), (3, 5), (2, 3)], [(5, 3)]])
def test_a_box_reads_the_token_whose_cell_and_level_fit_it(build, shapes):
    boxes = tiny.random_boxes(2, 200)
    boxes[:, :3] = torch.tensor([[0.0, 0.0, 1e-9, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.05, 0.05]])
    rows = rows_at(boxes, shapes)
    cells = [(lv, y, x) for lv, (height, width) in enumerate(shapes) for y in range(height) for x in range(width)]
    for box, row in zip(boxes.flatten(0, 1).tolist(), rows.flatten().tolist(), strict=True):
        size = max((box[2] * box[3]) ** 0.5, 1e-4)
        level = min(range(len(shapes)), key=lambda lv: max(size / (0.05 * 2**lv), 0.05 * 2**lv / size))
        height, width = shapes[level]
        nearest = min(
            (cell for cell in cells if cell[0] == level),
            key=lambda cell: max(
                abs((cell[2] + 0.5) / width - box[0]) * width, abs((cell[1] + 0.5) / height - box[1]) * height
            ),
        )
        assert cells[row] == nearest, box


@pytest.mark.parametrize("name", tiny.HYBRID)
def test_rt_detr_without_content_starts_from_its_own_tokens_without_gradient(build, name):
    adapter = adapter_for(build(name).requires_grad_(True))
    output, boxes = run(adapter, inputs_for(adapter)), tiny.random_boxes(2, 5)
    with seen_by(adapter.decoder) as calls:
        output.decode(ObjectQueries(boxes=boxes))
    content, model = calls[0]["inputs_embeds"], adapter.model.model
    memory = torch.cat([level.values.flatten(2) for level in output.features["encoder"]], -1).mT
    shapes = [tuple(level.values.shape[-2:]) for level in output.features["encoder"]]
    torch.testing.assert_close(content, model.enc_output(memory[torch.arange(2)[:, None], rows_at(boxes, shapes)]))
    assert not content.requires_grad


# --- precision and support -------------------------------------------------------------------------------------------


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
    found, base = {name for name, _ in adapter.backbone_parameters()}, adapter.model.base_model
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
    with pytest.raises(ValueError, match="yolos cannot be asked other queries: it has no decoder"):
        output.decode(ObjectQueries(boxes=tiny.random_boxes(2, 3)))


CHECKPOINTED = ["detr", "conditional_detr", "deformable_detr/plain", "deformable_detr/two_stage"]


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_activation_checkpointing_changes_no_gradient_of_either_pass(build, name):
    def outcome(checkpointed: bool) -> dict[str, Tensor | None]:
        model = build(name).train().requires_grad_(True)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        adapter = adapter_for(model)
        output = run(adapter, inputs_for(adapter), with_labels=True)
        sets = [foreign(adapter.spec, count, seed=count) for count in (3, 5)]
        together = [layer for layers in ask_together(output.decode, sets) for layer in layers]
        return gradients(model, output.loss + some_loss(output.decode(foreign(adapter.spec))) + some_loss(together))

    plain, checkpointed = outcome(False), outcome(True)
    for key, gradient in plain.items():
        assert (gradient is None) == (checkpointed[key] is None), key
        if gradient is not None:
            torch.testing.assert_close(checkpointed[key], gradient, atol=1e-5, rtol=1e-4)


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
