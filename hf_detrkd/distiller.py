"""The module that `Trainer` trains: the student and the methods' projections, with the teacher beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import adapter_for
from .matching import Assigning, run_together
from .methods import DistillationMethod
from .outputs import DetectorOutput, Predictions
from .questions import ask
from .targets import BatchTotals, Targets
from .teacher import Teacher


LAYER = re.compile(r"_\d+$")  # that ends the name of a loss


@dataclass(frozen=True)
class Losses:
    """The losses of one batch, with their graph.

    Attributes:
        detections ([`Predictions`]): what the student says is there.
        task (`dict[str, torch.Tensor]`): weighted parts of the detection loss, each `(num_layers,)`; empty without
            labels.
        distillation (`dict[str, torch.Tensor]`): unweighted scalars by name and layer.
        metrics (`dict[str, torch.Tensor]`): what the methods only report.
    """

    detections: Predictions
    task: dict[str, Tensor]
    distillation: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Distiller(nn.Module):
    """Student and methods in one module, so that DDP, mixed precision and the optimizer see both.

    In training mode `forward` computes `task loss + weight * sum(weights[k] * losses[k])`. In eval mode it is the
    student: the same answers, no teacher.

    Args:
        student ([`~transformers.PreTrainedModel`])
        teacher ([`Teacher`], *optional*): kept outside the module tree.
        methods (`Sequence[DistillationMethod]`): all of them take part in every step, with one pass of the teacher.
        loss_weights (`dict[str, float]`, *optional*): weights that replace the methods' own; a key weighs every loss
            whose name begins with it, the longest one wins.
        seed (`int`): of the methods' random points.

    Raises:
        ValueError: a teacher without a method, or a method without the teacher that it needs; a key of `loss_weights`
            that no part of the methods begins with.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher | None = None,
        methods: Sequence[DistillationMethod] = (),
        loss_weights: Mapping[str, float] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if (teacher is None) == any(method.needs_teacher for method in methods):
            raise ValueError("A method needs a teacher and a teacher a method: give both, or none for plain training.")
        self.student = student
        self.methods = nn.ModuleDict({method.name: method for method in methods})
        self.teacher = teacher
        self.adapter = adapter_for(student)
        self.seed = seed
        self.loss_weights = check_weights(methods, loss_weights or {})

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

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """What `Trainer` calls for `--gradient_checkpointing`: the student's."""
        self.student.gradient_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The same under its name in later transformers."""
        self.student.activation_checkpointing_enable(*args, **kwargs)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        totals: Tensor | None = None,
        step: int = 0,
        distillation_weight: float = 1.0,
        teacher_pixel_values: Tensor | None = None,
        teacher_pixel_mask: Tensor | None = None,
    ) -> dict[str, Any]:
        """One pass.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised for the student.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*)
            labels (`list[dict[str, torch.Tensor]]`, *optional*): `class_labels` and `boxes` of each image.
            totals (`torch.Tensor` of shape `(4,)`, *optional*): the fields of [`BatchTotals`].
            step (`int`): the optimizer step; random points follow it.
            distillation_weight (`float`): of the methods' weighted sum, from its schedule; at 0 neither teacher nor
                methods are asked.
            teacher_pixel_values, teacher_pixel_mask (*optional*): the same images in the teacher's size, normalised
                for the student; default: what the student sees.

        Returns:
            `dict`: `loss`, `parts` (detached scalars by name, for the log), `terms` (detached losses by name, each per
            layer or of the layer that ends its name), `logits` and `pred_boxes`.
        """
        teacher_view = (teacher_pixel_values, teacher_pixel_mask)
        found = self.losses(pixel_values, pixel_mask, labels, totals, step, bool(distillation_weight), *teacher_view)
        outputs: dict[str, Any] = {"loss": None, "parts": {}, "terms": {}}
        outputs |= {"logits": found.detections.logits, "pred_boxes": found.detections.boxes}
        if not found.task:
            return outputs
        loss = torch.cat(list(found.task.values())).sum()
        task = {f"task_{name}": layers.detach() for name, layers in found.task.items()}
        parts = {name: layers.sum() for name, layers in task.items()} | {"task_loss": loss.detach()}
        if found.distillation:
            weighted = self.weighted(found.distillation)
            parts |= {"distillation_loss": weighted.detach()} | sum_over_layers(found.distillation)
            parts |= found.metrics
            loss = loss + distillation_weight * weighted
        terms = task | {name: value.detach() for name, value in found.distillation.items()}
        return outputs | {"loss": loss, "parts": parts, "terms": terms}

    def losses(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        totals: Tensor | None = None,
        step: int = 0,
        distill: bool = True,
        teacher_pixel_values: Tensor | None = None,
        teacher_pixel_mask: Tensor | None = None,
    ) -> Losses:
        """Every loss of a batch apart: see [`forward`]; without `distill` and in eval mode of the task alone."""
        targets = None if labels is None else Targets.from_labels(labels)
        output, answers = self.adapter.encode(pixel_values, pixel_mask, targets)
        if targets is None or answers is None:
            return Losses(output.found, {}, {})
        counts = BatchTotals.of(targets.counts, self.adapter.spec.num_queries)
        if totals is not None:
            images, boxes, matched, share = totals.unbind()
            counts = BatchTotals(images, boxes, matched, share, is_global=True)
        computations: list[Assigning[dict[str, Tensor]]] = [self.adapter.criterion.steps(answers, targets, counts)]
        if self.training and distill and self.methods:
            view = pixel_values, pixel_mask
            if teacher_pixel_values is not None:
                view = teacher_pixel_values, teacher_pixel_mask
            wanted = None if self.teacher is None else self.teacher(*view)
            computations += self._distillation(output, wanted, targets, counts, step)
        task, *distillation = run_together(*computations)
        everything = {name: value for losses in distillation for name, value in losses.items()}
        reported = [name for method in self.methods.values() for name in cast(DistillationMethod, method).metrics]
        metrics = {name: everything.pop(name).detach() for name in reported if name in everything}
        return Losses(output.found, task, everything, metrics)

    def _distillation(
        self, student: DetectorOutput, teacher: DetectorOutput | None, targets: Targets, totals: BatchTotals, step: int
    ) -> list[Assigning[dict[str, Tensor]]]:
        """Every method's computation, after all of them have asked their questions together."""
        methods: list[Any] = list(self.methods.values())
        seed = _mix(self.seed, step)  # each method's points are those that it would draw alone
        questions = [m.questions(student, teacher, targets, torch.Generator().manual_seed(seed)) for m in methods]
        replies = ask(questions, student, teacher)
        return [m.steps(student, teacher, reply, targets, totals) for m, reply in zip(methods, replies, strict=True)]

    def weighted(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the methods' losses."""
        return torch.stack([self.weight_of(name) * value for name, value in losses.items()]).sum()

    def weight_of(self, name: str) -> float:
        """The weight of a loss by its full name."""
        return self.loss_weights[self.weight_key(name)]

    def weights_under(self, part: str) -> list[float]:
        """The weights that losses of a part may have: the part's own, and those of its layers that have one."""
        own = [weight for key, weight in self.loss_weights.items() if re.fullmatch(rf"{part}_\d+", key)]
        return [self.weight_of(part), *own]

    def weight_key(self, name: str) -> str:
        """The key of `loss_weights` that weighs a loss: the longest that its name begins with. A key with a layer
        weighs that layer alone."""
        fitting = (key for key in self.loss_weights if key == name or (not LAYER.search(key) and name.startswith(key)))
        return max(fitting, key=len)


def check_weights(methods: Sequence[DistillationMethod], chosen: Mapping[str, float]) -> dict[str, float]:
    """The methods' weights with the chosen ones over them: a key stands for every part or loss that it begins."""
    defaults: dict[str, float] = {}
    names: list[str] = []
    for method in methods:
        defaults |= method.weights
        names += [*method.weights, *(f"{part}_{group}" for part in method.weights for group in method.groups)]
    for key in chosen:
        if not any(name.startswith(key) or re.fullmatch(rf"{name}_\d+", key) for name in names):
            known = ", ".join(names) or "none, since there is no method"
            raise ValueError(f"loss_weights names {key!r}, which begins no loss of this run: they are {known}.")
    shorter = sorted(chosen, key=len)
    parts = {part: chosen[key] for key in shorter for part in defaults if part.startswith(key)}
    return defaults | parts | {key: weight for key, weight in chosen.items() if key not in defaults}


def without_layer(name: str) -> str:
    """The name of a loss without the layer that ends it."""
    return name.rsplit("_", 1)[0]


def sum_over_layers(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached losses by name without the layer at the end, summed over layers."""
    parts: dict[str, Tensor] = {}
    for name, value in losses.items():
        part = without_layer(name)
        parts[part] = parts.get(part, 0) + value.detach()
    return parts


def _mix(seed: int, step: int) -> int:
    """One seed from two, such that neighbours in either give unrelated streams."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**63
