"""Padding and feature maps: what every adapter promises of the places that are not queries."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_detrkd.adapters import ADAPTERS, adapter_for
from tests import tiny
from tests.adapters.contract import Layers, assert_same, both_modes, differ, foreign, inputs_for, run, seen_by


MASKING = [name for name in tiny.FAMILIES if ADAPTERS[tiny.config(name).model_type].uses_pixel_mask]


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
    with pytest.raises(ValueError, match=f"{name} cannot mask padding, but the batch is padded: resize"):
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
