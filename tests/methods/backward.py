"""Backward pass of a method's losses: their sum, and its gradients by parameter name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def total(losses: dict[str, Tensor], without: Sequence[str] = ()) -> Tensor:
    return torch.stack([value for name, value in losses.items() if name not in without]).sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Zeros where there is none."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}
