"""The module that `Trainer` trains: the student and the method's projections, with the teacher beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import adapter_for
from .matching import Assigning, run_together
from .methods import DistillationMethod
from .outputs import BatchTotals, Predictions, Targets
from .teacher import Teacher


class Distiller(nn.Module):
    """Student and method in one module, so that DDP, mixed precision and the optimizer see both.

    In training mode `forward` computes `task loss + weight * sum(weights[k] * losses[k])`. In eval mode it is the
    student: the same answers, no teacher.

    Args:
        student ([`~transformers.PreTrainedModel`])
        teacher ([`Teacher`], *optional*): kept outside the module tree.
        method ([`DistillationMethod`], *optional*): both or none of teacher and method.
        loss_weights (`dict[str, float]`, *optional*): weights that replace the method's own; a key weighs every loss
            whose name begins with it, the longest one wins.
        seed (`int`): of the method's random points.

    Raises:
        ValueError: a key of `loss_weights` that no part of the method begins with.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher | None = None,
        method: DistillationMethod | None = None,
        loss_weights: Mapping[str, float] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if (teacher is None) != (method is None):
            raise ValueError("A method needs a teacher and a teacher a method: give both, or none for plain training.")
        self.student = student
        self.method = method
        self.teacher = teacher
        self.adapter = adapter_for(student)
        self.seed = seed
        self.loss_weights = check_weights(method, loss_weights or {})

    @property
    def config(self) -> Any:
        return self.student.config

    def train(self, mode: bool = True) -> Distiller:
        """As in `torch.nn.Module`, but BatchNorm layers whose weights are frozen keep their statistics too."""
        super().train(mode)
        for module in self.student.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        totals: Tensor | None = None,
        step: int = 0,
        distillation_weight: float = 1.0,
    ) -> dict[str, Any]:
        """One pass.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised for the student.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*)
            labels (`list[dict[str, torch.Tensor]]`, *optional*): `class_labels` and `boxes` of each image.
            totals (`torch.Tensor` of shape `(4,)`, *optional*): the fields of [`BatchTotals`].
            step (`int`): the optimizer step; random points follow it.
            distillation_weight (`float`): of the method's weighted sum, from its schedule; at 0 neither teacher nor
                method is asked.

        Returns:
            `dict`: `loss`, `parts` (detached scalars by name, for the log), `logits` and `pred_boxes`.
        """
        targets = None if labels is None else Targets.from_labels(labels)
        output, answers = self.adapter.encode(pixel_values, pixel_mask, targets)
        last: Predictions = output.layers[-1]
        outputs: dict[str, Any] = {"loss": None, "parts": {}, "logits": last.logits, "pred_boxes": last.boxes}
        if targets is None or answers is None:
            return outputs
        counts = BatchTotals.of(targets.counts, self.adapter.spec.num_queries)
        if totals is not None:
            images, boxes, matched, share = totals.unbind()
            counts = BatchTotals(images, boxes, matched, share, is_global=True)
        computations: list[Assigning[dict[str, Tensor]]] = [self.adapter.criterion.steps(answers, targets, counts)]
        if self.training and distillation_weight and self.method is not None and self.teacher is not None:
            generator = torch.Generator().manual_seed(_mix(self.seed, step))
            wanted = self.teacher(pixel_values, pixel_mask)
            computations.append(self.method.steps(output, wanted, targets, counts, generator))
        task, *distillation = run_together(*computations)
        loss = torch.stack(list(task.values())).sum()
        parts = {f"task_{name}": part.detach() for name, part in task.items()} | {"task_loss": loss.detach()}
        for losses in distillation:
            weighted = torch.stack([self.weight_of(name) * value for name, value in losses.items()]).sum()
            parts |= {"distillation_loss": weighted.detach()} | sum_over_layers(losses)
            loss = loss + distillation_weight * weighted
        return outputs | {"loss": loss, "parts": parts}

    def weight_of(self, name: str) -> float:
        """The weight of a loss by its full name."""
        return self.loss_weights[max((key for key in self.loss_weights if name.startswith(key)), key=len)]


def check_weights(method: DistillationMethod | None, chosen: Mapping[str, float]) -> dict[str, float]:
    """The method's weights with the chosen ones over them: a key stands for every part or loss that it begins."""
    defaults = {} if method is None else method.weights
    groups = () if method is None else method.groups
    names = [*defaults, *(f"{part}_{group}" for part in defaults for group in groups)]
    for key in chosen:
        if not any(name.startswith(key) or re.fullmatch(rf"{name}_\d+", key) for name in names):
            known = ", ".join(names) or "none, since there is no method"
            raise ValueError(f"loss_weights names {key!r}, which begins no loss of this run: they are {known}.")
    shorter = sorted(chosen, key=len)
    parts = {part: chosen[key] for key in shorter for part in defaults if part.startswith(key)}
    return defaults | parts | {key: weight for key, weight in chosen.items() if key not in defaults}


def sum_over_layers(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached losses by name without the layer at the end, summed over layers."""
    parts: dict[str, Tensor] = {}
    for name, value in losses.items():
        part = name.rsplit("_", 1)[0]
        parts[part] = parts.get(part, 0) + value.detach()
    return parts


def _mix(seed: int, step: int) -> int:
    """One seed from two, such that neighbours in either give unrelated streams."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**63
