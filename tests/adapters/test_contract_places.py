"""Placement of queries: the decoder's reference points, and the encoder tokens of a place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_detrkd.adapters import DetectorAdapter, adapter_for, spec_for
from hf_detrkd.adapters.rt_detr import rows_at
from hf_detrkd.structures.outputs import ObjectQueries
from tests import tiny
from tests.adapters.contract import (
    assert_same,
    both_modes,
    foreign,
    inputs_for,
    least_field,
    run,
    seen_by,
    ways_to_ask,
)


SPECS = {name: spec_for(tiny.config(name)) for name in tiny.FAMILIES}
PLACED = [name for name, spec in SPECS.items() if spec.query_fields & {"boxes", "points"}]
TWO_STAGE = ["deformable_detr/two_stage", *tiny.HYBRID]


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
    with seen_by(layer.cross_attn if adapter.spec.family in tiny.GROUPED else layer.encoder_attn) as calls:
        ask()
    return calls[0]["reference_points"][:, :, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PLACED)
def test_boxes_and_images_of_next_to_nothing_are_finite_in_16_bits(build, name, dtype):
    adapter = adapter_for(build(name))
    pixels = {"pixel_values": torch.zeros_like(inputs_for(adapter)["pixel_values"])}
    boxes = torch.tensor([[0.5, 0.5, 1e-6, 1e-6], [1.0, 0.0, 0.0, 0.0], [1e-6, 1.0, 1.0, 1e-6]]).expand(2, -1, -1)
    with torch.autocast("cpu", dtype):
        for layer in run(adapter, pixels).decode(ObjectQueries(boxes=boxes)):
            assert layer.logits.isfinite().all() and layer.boxes.isfinite().all()


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
    if name in tiny.DENOISING:
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
