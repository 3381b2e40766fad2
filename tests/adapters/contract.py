"""A detector of any family, asked twice: what the tests of the adapters' contract share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_detrkd.adapters import DetectorAdapter
from hf_detrkd.structures.outputs import DetectorOutput, DetectorSpec, ObjectQueries, Predictions
from hf_detrkd.structures.targets import Targets
from tests import tiny


Layers = Sequence[Predictions]
both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


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
