"""Module trained by `Trainer`: student and method projections, with the teacher outside the module tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapters import adapter_for
from ..losses.matching import to_host_by_group
from ..methods import DistillationMethod
from ..methods.base import checked_costs, checked_losses
from ..methods.decoding import DecodedQueries, decode_requests
from ..structures.loss_key import LossKey
from ..structures.outputs import DetectorOutput, Predictions
from ..structures.targets import BatchTotals, Targets, known_labels, labeled_rows
from .stored_teacher import StoredTeacher
from .teacher import Teacher


@dataclass(frozen=True)
class Losses:
    """The losses of one batch, with their autograd graph.

    Attributes:
        detections ([`Predictions`]): the student's detections.
        task (`dict[str, torch.Tensor]`): weighted parts of the detection loss, each `(num_layers,)`; empty without
            labels.
        distillation (`dict[LossKey, torch.Tensor]`): unweighted scalars.
        metrics (`dict[LossKey, torch.Tensor]`): values that the methods only report, detached.
    """

    detections: Predictions
    task: dict[str, Tensor]
    distillation: dict[LossKey, Tensor]
    metrics: dict[LossKey, Tensor] = field(default_factory=dict)


class Outputs(dict[str, Any]):
    """The outputs of a forward pass by name, which are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Distiller(nn.Module):
    """Student and methods in one module, so that DDP, mixed precision and the optimizer handle both.

    In training mode `forward` computes the task loss plus, for every method, its factor times
    `sum(weights[k] * losses[k])`. In eval mode it returns the
    student's predictions and does not run the teacher.

    Args:
        student ([`~transformers.PreTrainedModel`])
        teacher ([`Teacher`] or [`StoredTeacher`], *optional*): kept outside the module tree.
        methods (`Sequence[DistillationMethod]`): all are computed in every step, with one forward pass of the teacher.
        loss_weights (`dict[str, float]`, *optional*): weights that replace the methods' defaults; a key applies to
            every loss whose name starts with it, and the longest matching key wins.
        seed (`int`): seed of the methods' random points.

    Raises:
        ValueError: a teacher without a method, or a method without the teacher that it needs; a key of `loss_weights`
            that no loss name starts with.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher | StoredTeacher | None = None,
        methods: Sequence[DistillationMethod] = (),
        loss_weights: Mapping[str, float] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if (teacher is None) == any(method.needs_teacher for method in methods):
            raise ValueError("Distillation needs a teacher and a method: give both, or neither for plain training.")
        self.student = student
        self.methods = nn.ModuleDict({method.name: method for method in methods})
        self.teacher = teacher
        self.adapter = adapter_for(student)
        self.seed = seed
        self.loss_weights = check_weights(methods, loss_weights or {})

    @property
    def config(self) -> Any:
        return self.student.config

    # What callbacks written for `Trainer` ask of its model.

    @property
    def device(self) -> torch.device:
        return self.student.device

    def num_parameters(self, *args: Any, **kwargs: Any) -> int:
        return int(self.student.num_parameters(*args, **kwargs))

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Saves the student."""
        return self.student.save_pretrained(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Pushes the student."""
        return self.student.push_to_hub(*args, **kwargs)

    def train(self, mode: bool = True) -> Distiller:
        """As in `torch.nn.Module`, but BatchNorm layers with frozen weights stay in eval mode and keep statistics."""
        super().train(mode)
        for module in self.student.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Enables it in the student; called by `Trainer` for `--gradient_checkpointing`."""
        self.student.gradient_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The same under the name of later transformers versions."""
        self.student.activation_checkpointing_enable(*args, **kwargs)

    def forward(
        self,
        batch: Mapping[str, Any] | None = None,
        step: int = 0,
        distillation_weights: Mapping[str, float] | None = None,
        **inputs: Any,
    ) -> Outputs:
        """Computes the loss and the predictions of one batch.

        Args:
            batch (`dict`, *optional*): output of the data collator; its parts may also be keyword arguments:

                - `pixel_values` (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised for the
                  student.
                - `pixel_mask` (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*)
                - `labels` (`list[dict[str, torch.Tensor]]`, *optional*): `class_labels` and `boxes` of each image.
                  Those with `labeled` false enter only the methods' losses.
                - `totals` (`torch.Tensor` of shape `(2, 5)`, *optional*): see [`BatchTotals.counted`].
                - `teacher_pixel_values`, `teacher_pixel_mask` (*optional*): the same images at the teacher's size,
                  normalised for the student. Default: the student's images.
            step (`int`): the optimizer step; seeds the random points together with `seed`.
            distillation_weights (`dict[str, float]`, *optional*): factor of each method's weighted sum, from its
                schedule; if all are 0, neither teacher nor methods run. Default: 1.

        Returns:
            [`Outputs`]: `loss`, `parts` (detached scalars by name, for the log), `terms` (detached losses by name,
            scalars by [`LossKey`] or one value per layer), `logits` and `pred_boxes`.
        """
        factors = dict.fromkeys(self.methods, 1.0) if distillation_weights is None else distillation_weights
        found = self.losses({**(batch or {}), **inputs}, step, any(factors.values()))
        outputs = Outputs(loss=None, parts={}, terms={})
        outputs.update(logits=found.detections.logits, pred_boxes=found.detections.boxes)
        if not found.task:
            return outputs
        loss = torch.cat(list(found.task.values())).sum()
        task = {LossKey("task", name): layers.detach() for name, layers in found.task.items()}
        parts: dict[Any, Tensor] = {"task_loss": loss.detach()}
        parts.update({key: layers.sum() for key, layers in task.items()})
        if found.distillation:
            weighted = self.weighted(found.distillation)
            parts["distillation_loss"] = torch.stack(list(weighted.values())).sum().detach()
            parts.update(sum_over_layers(found.distillation))
            parts.update(found.metrics)
            loss = loss + torch.stack([factors[key.method] * value for key, value in weighted.items()]).sum()
        terms = task | {key: value.detach() for key, value in found.distillation.items()}
        outputs.update(loss=loss, parts=parts, terms=terms)
        return outputs

    def losses(self, batch: Mapping[str, Any], step: int = 0, distill: bool = True) -> Losses:
        """All losses of a batch, see [`forward`]; in eval mode or without `distill` only the task loss."""
        labels, totals = batch.get("labels"), batch.get("totals")
        truth = None if labels is None else Targets.from_labels(known_labels(labels))
        output, answers = self.adapter.encode(batch["pixel_values"], batch.get("pixel_mask"), truth)
        if labels is None or truth is None or answers is None:
            return Losses(output.found, {}, {})
        rows, queries = labeled_rows(labels), self.adapter.spec.num_queries
        targets = truth if rows is None else Targets.from_labels(labels)  # the methods' take all that is there
        answers, truth = answers.of_images(rows), truth.of_images(rows)
        if totals is None:
            counts, task_counts = (BatchTotals.of(one.counts, queries) for one in (targets, truth))
        else:
            counts, task_counts = map(BatchTotals.from_counts, totals)
        criterion, methods = self.adapter.criterion, self._methods() if self.training and distill else []
        wanted = None if self.teacher is None or not methods else self.teacher.of(batch)
        decoded = self._decode(methods, output, wanted, targets, self._query_seed(step, batch))
        with torch.autocast(targets.boxes.device.type, enabled=False):
            costs = [
                checked_costs(m, m.costs(output, wanted, d, targets)) for m, d in zip(methods, decoded, strict=True)
            ]
            own, *others = to_host_by_group([criterion.costs(answers, truth), *costs])
            task = criterion.losses(answers, truth, task_counts, own)
            everything: dict[LossKey, Tensor] = {}
            for method, predictions, host_costs in zip(methods, decoded, others, strict=True):
                losses = method.losses(output, wanted, predictions, targets, counts, host_costs)
                everything |= checked_losses(method, losses)
        metrics = {name: everything.pop(name).detach() for m in methods for name in m.metrics if name in everything}
        return Losses(output.found, task, everything, metrics)

    def _methods(self) -> list[Any]:
        return list(self.methods.values())

    def _decode(
        self,
        methods: Sequence[DistillationMethod],
        student: DetectorOutput,
        teacher: DetectorOutput | None,
        targets: Targets,
        seed: int,
    ) -> list[DecodedQueries]:
        """Predictions for the extra queries of all methods, with one decoder pass per model. `seed` is the same for
        every method, so its points do not depend on the other methods."""
        requests = [
            m.query_requests(student, cast(Any, teacher), targets, torch.Generator().manual_seed(seed))
            for m in methods
        ]
        return decode_requests(requests, student, teacher, [m.name for m in methods])

    def _query_seed(self, step: int, batch: Mapping[str, Any]) -> int:
        """Seed of the random queries: of the step, or with stored answers of the view that the teacher saw."""
        if isinstance(self.teacher, StoredTeacher) and "view" in batch:
            return mixed_seed(self.teacher.seed, batch["view"])
        return mixed_seed(self.seed, step)

    def weighted(self, losses: Mapping[LossKey, Tensor]) -> dict[LossKey, Tensor]:
        """The methods' losses, each times its weight."""
        return {key: self.weight_of(key) * value for key, value in losses.items()}

    def weight_of(self, key: LossKey) -> float:
        """The weight of a loss."""
        return self.loss_weights[self.weight_key(key)]

    def weights_of(self, term: LossKey) -> list[float]:
        """All weights that apply to a term: the term's weight, and the weights set for single layers."""
        layers = [weight for name, weight in self.loss_weights.items() if is_layer_of(name, term)]
        return [self.weight_of(term), *layers]

    def weight_key(self, key: LossKey) -> str:
        """The key of `loss_weights` that applies to a loss: its full name, or the longest prefix of its term."""
        return max((name for name in self.loss_weights if name == key or key.term.startswith(name)), key=len)


def is_layer_of(name: str, term: str) -> bool:
    """True if `name` is `term` followed by a layer number."""
    start, _, layer = name.rpartition("_")
    return start == term and layer.isdigit()


def check_weights(methods: Sequence[DistillationMethod], chosen: Mapping[str, float]) -> dict[str, float]:
    """The methods' default weights, overridden by the chosen ones: a key applies to every loss that starts with it.

    Raises:
        ValueError: no loss of the methods starts with a chosen key.
    """
    defaults: dict[str, float] = {}
    names: list[str] = []
    for method in methods:
        defaults |= method.weights
        names += [*method.weights, *(f"{part}_{group}" for part in method.weights for group in method.groups)]
    for key in chosen:
        if not any(name.startswith(key) or is_layer_of(key, name) for name in names):
            known = ", ".join(names) or "none, since there is no method"
            raise ValueError(f"No loss of this run starts with the key {key!r} of loss_weights: they are {known}.")
    shorter = sorted(chosen, key=len)
    parts = {part: chosen[key] for key in shorter for part in defaults if part.startswith(key)}
    return defaults | parts | {key: weight for key, weight in chosen.items() if key not in defaults}


def sum_over_layers(losses: Mapping[LossKey, Tensor]) -> dict[LossKey, Tensor]:
    """Detached losses by term, summed over layers."""
    parts: dict[LossKey, Tensor] = {}
    for key, value in losses.items():
        parts[key.term] = parts.get(key.term, 0) + value.detach()
    return parts


def mixed_seed(seed: int, step: int) -> int:
    """Mixes seed and step into one seed, so that neighbouring values give unrelated random streams."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**63
