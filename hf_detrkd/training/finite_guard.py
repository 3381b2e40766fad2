"""Guard that stops a run when a loss or a weight is not finite."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..structures.loss_key import LossKey


@dataclass(frozen=True)
class Watched:
    """The losses of one micro-batch, being copied to the host."""

    step: int
    names: tuple[str, ...]
    finite: Tensor
    image_ids: Tensor | None
    copied: Any


class FiniteGuard:
    """Detects losses that are NaN or infinite without making the host wait for the device.

    The flags are copied to the host asynchronously and read when the copy is complete: at the next step, whose
    matching waits for the device anyway, or by [`settle`] before anything is saved.
    """

    def __init__(self) -> None:
        self._watched: deque[Watched] = deque()

    def watch(self, step: int, terms: Mapping[LossKey, Tensor], labels: Sequence[Mapping[str, Tensor]]) -> None:
        """Registers a micro-batch's losses, and checks those of earlier ones whose copy is complete.

        Args:
            step (`int`)
            terms (`dict[LossKey, torch.Tensor]`): scalars, or one value per layer.
            labels: of the images, with their `image_id` if they have one.

        Raises:
            FloatingPointError: an earlier loss was not finite.
        """
        self._read(wait=False)
        names = [
            key.readable if len(v) == 1 else key.at(layer).readable
            for key, v in _rows(terms)
            for layer in range(len(v))
        ]
        finite = torch.cat([value for _, value in _rows(terms)]).isfinite()
        ids = [label["image_id"].flatten() for label in labels if "image_id" in label]
        copied = None
        if finite.is_cuda:
            finite = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._watched.append(Watched(step, tuple(names), finite, torch.cat(ids) if ids else None, copied))

    def settle(self, model: nn.Module | None = None) -> None:
        """Checks all registered losses, waiting for the device; with a model, also its weights.

        Raises:
            FloatingPointError: a loss or a weight is not finite.
        """
        self._read(wait=True)
        if model is None:
            return
        norms = torch.stack(torch._foreach_norm([p.detach() for p in model.parameters()]))
        if not bool(norms.isfinite().all()):
            broken = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
            raise FloatingPointError(
                f"The student's weights are not finite although every loss was, first {broken[0]!r}: the run stops "
                "before saving them. Lower --learning_rate, or use bf16 instead of fp16."
            )

    def _read(self, wait: bool) -> None:
        while self._watched:
            first = self._watched[0]
            if first.copied is not None:
                if wait:
                    first.copied.synchronize()
                elif not first.copied.query():
                    return
            self._watched.popleft()
            if not bool(first.finite.all()):
                raise FloatingPointError(message_of(first))


def _rows(terms: Mapping[LossKey, Tensor]) -> list[tuple[LossKey, Tensor]]:
    return [(name, value.detach().reshape(-1)) for name, value in terms.items()]


def message_of(watched: Watched) -> str:
    """The error message, which names term, layer and images."""
    broken = [name for name, fine in zip(watched.names, watched.finite.tolist(), strict=True) if not fine]
    ids = "unknown" if watched.image_ids is None else ", ".join(map(str, watched.image_ids.tolist()))
    more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
    return (
        f"Step {watched.step}: non-finite losses: {'; '.join(broken[:5])}{more}, on the images with ids {ids}. The "
        "last checkpoint is intact: resume from it with --resume_from_checkpoint, with a lower --learning_rate or "
        "with bf16 instead of fp16, and check the boxes of these images."
    )
