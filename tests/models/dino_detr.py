"""A small DINO, its decoder's inputs, and gradients, for the tests of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_detrkd.models import DinoDetrForObjectDetection


Build = Callable[..., DinoDetrForObjectDetection]
DECODED = ("intermediate_logits", "intermediate_reference_points", "intermediate_hidden_states")
"""What the decoder says, layers in the second dimension and rows in the third."""


def run(model: nn.Module, inputs: dict[str, Any], labels: bool = True) -> Any:
    torch.manual_seed(0)  # denoising draws random numbers
    return model(**{key: value for key, value in inputs.items() if labels or key != "labels"})


@contextmanager
def asked(model: nn.Module, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda _: {}) -> Iterator[dict]:
    """Keyword arguments of the decoder's call, after `change` replaced some of them."""
    seen: dict[str, Any] = {}

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        seen.update(kwargs | change(kwargs))
        return args, dict(seen)

    handle = model.model.decoder.register_forward_pre_hook(hook, with_kwargs=True)
    yield seen
    handle.remove()


def gradients(loss: Tensor, of: nn.Module | Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the parameters of a module, or of tensors; zero where there is none."""
    tensors = list(of.parameters()) if isinstance(of, nn.Module) else list(of)
    found = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def assert_same_gradients(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Each differs by no more than `tolerance` of its own norm, or of a tenth of all together."""
    whole = torch.cat([gradient.flatten() for gradient in expected]).norm()
    assert whole > 0
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * max(other.norm(), 0.1 * whole)
