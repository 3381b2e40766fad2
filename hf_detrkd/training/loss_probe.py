"""Measures the value and gradient norm of each loss term, before training or to calibrate its weight."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distillation.distiller import Distiller
from ..structures.loss_key import LossKey


Precision = Callable[[], AbstractContextManager[Any]]
"""Makes the context manager of a forward pass (autocast)."""


BROKEN = (
    "Check the class map (with a single class in common --class_loss must be bce), the teacher's preprocessing, "
    "frozen parameters and --loss_weights. Terms with weight 0 are not checked, and --probe false disables the check."
)
STRONG = (
    "The student would hardly learn its task. --calibrate_weights auto sets weights that fit this pair, and "
    "--loss_weights a single one; --max_gradient_ratio 0 trains anyway."
)


@dataclass(frozen=True)
class Term:
    """One term of the loss.

    Attributes:
        name (`str`): without the layer; values are summed over layers.
        value (`float`): unweighted.
        weighted (`float`): as it enters the loss, before the schedule.
        gradient (`float`): norm of the gradient of the weighted term on the student's parameters.
    """

    name: str
    value: float
    weighted: float
    gradient: float


@dataclass(frozen=True)
class Probe:
    """The terms of one batch, with the task loss and the norm of its gradient."""

    task: float
    task_gradient: float
    terms: tuple[Term, ...]

    def table(self) -> str:
        """The terms as text: value, weighted value and its share of the task loss, gradient norm and its ratio."""
        width = max(len("task loss"), *(len(term.name) for term in self.terms)) + 2
        titles = f"{'value':>12}{'weighted':>12}{'/ task':>9}{'gradient':>12}{'/ task':>9}"
        lines = [f"{'':{width}}{titles}"]
        task = f"{self.task:12.4g}{self.task:12.4g}{'':9}{self.task_gradient:12.4g}"
        lines.append(f"{'task loss':{width}}{task}")
        for term in self.terms:
            shares = [ratio(term.weighted, self.task), ratio(term.gradient, self.task_gradient)]
            figures = f"{term.value:12.4g}{term.weighted:12.4g}{shares[0]:9.3g}{term.gradient:12.4g}{shares[1]:9.3g}"
            lines.append(f"{term.name:{width}}{figures}")
        return "\n".join(lines)

    def faults(self, weights: Mapping[str, float], most: float = 0.0) -> dict[str, str]:
        """The fault of each faulty term: not finite, zero, without gradient to the student, or with too large a one.

        Args:
            weights (`dict[str, float]`): weight of each term; terms with weight 0 are not checked.
            most (`float`): largest gradient norm of a term, relative to the task loss's; 0 for no limit.
        """
        faults = {}
        for term in self.terms:
            fault = _fault(term.value, term.gradient)
            share = ratio(term.gradient, self.task_gradient)
            if fault is None and most and share > most:
                fault = f"too strong: its gradient is {share:.3g} times the detection loss's (at most {most:g})"
            if weights[term.name] and fault:
                faults[term.name] = fault
        if self.terms and not any(weights.values()):
            faults["every term"] = "given the weight 0"
        return faults

    def refuse(self, faults: Mapping[str, str]) -> None:
        """
        Raises:
            ValueError: there are faults.
        """
        if not faults:
            return
        listed = "; ".join(f"{name} is {fault}" for name, fault in faults.items())
        advice = STRONG if all("too strong" in fault for fault in faults.values()) else BROKEN
        raise ValueError(f"Distillation would not work as intended: {listed}. {advice}\n{self.table()}")


def _fault(value: float, gradient: float) -> str | None:
    if not math.isfinite(value):
        return f"{value}"
    if not math.isfinite(gradient):
        return f"{value:.4g}, and its gradient {gradient}"
    if value == 0:
        return "zero"
    return "without gradient to the student" if gradient == 0 else None


def ratio(value: float, whole: float) -> float:
    """The quotient; NaN if the divisor is zero."""
    return value / whole if whole else math.nan


def probe(distiller: Distiller, batch: Mapping[str, Any], precision: Precision) -> Probe:
    """Measures the terms of one batch; model, buffers and random state are left unchanged.

    Args:
        distiller ([`Distiller`])
        batch (`dict`): input of the distiller, on its device.
        precision: see [`Precision`].
    """
    with untouched(distiller):
        return measure(distiller, batch, precision, lambda key: key.term)


def measure(
    distiller: Distiller, batch: Mapping[str, Any], precision: Precision, group: Callable[[LossKey], str]
) -> Probe:
    """The terms of one batch, summed over the losses that `group` maps to one name; one device-to-host copy."""
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    with precision():
        found = distiller.losses(batch)
    task = torch.cat(list(found.task.values())).sum()
    values: dict[str, list[Tensor]] = {}
    for name, value in found.distillation.items():
        both = torch.stack([value, distiller.weight_of(name) * value])
        values.setdefault(group(name), []).append(both)
    sums = {name: torch.stack(both).sum(0) for name, both in values.items()}
    figures = [task.detach(), _gradient(task, parameters)]
    for value, weighted in sums.values():
        figures += [value.detach(), weighted.detach(), _gradient(weighted, parameters)]
    task_value, task_gradient, *rest = torch.stack([figure.double() for figure in figures]).tolist()
    triples = zip(rest[::3], rest[1::3], rest[2::3], strict=True)
    return Probe(task_value, task_gradient, tuple(Term(n, *t) for n, t in zip(sums, triples, strict=True)))


def _gradient(value: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    """Gradient norm of a scalar, itself a scalar; 0 if there is no gradient."""
    if not value.requires_grad:
        return torch.zeros((), device=value.device)
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
    return torch.stack(norms).norm() if norms else torch.zeros((), device=value.device)


@contextmanager
def untouched(distiller: Distiller) -> Iterator[None]:
    """Sets training mode; on exit restores the distiller's weights, buffers and mode, and the random state."""
    state = {name: value.detach().clone() for name, value in distiller.state_dict().items()}
    mode = distiller.training
    device = next(distiller.student.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            distiller.train()
            yield
        finally:
            distiller.train(mode)
            distiller.load_state_dict(state)
            distiller.zero_grad(set_to_none=True)


def calibrate(
    distiller: Distiller,
    batches: Iterable[Mapping[str, Any]],
    count: int,
    learning_rate: float,
    max_grad_norm: float,
    precision: Precision,
    measurements: int = 20,
) -> dict[str, float | None]:
    """Ratio of the task loss's gradient norm to that of each weighted term.

    The student is trained with only the task loss on the batches, since the first step says little, and restored
    afterwards. At evenly spaced steps the norms of all gradients on the student's parameters are measured.

    Args:
        distiller ([`Distiller`])
        batches: inputs of the distiller, on its device.
        count (`int`): number of batches.
        learning_rate, max_grad_norm (`float`): of the training.
        precision: see [`Precision`].
        measurements (`int`): number of steps to measure, from this many to just below twice as many.

    Returns:
        `dict[str, float | None]`: the median ratio for each key of `distiller.loss_weights`, in the same order; NaN
        for one with weight 0 or whose terms never had a gradient, `None` for one that no term uses.
    """
    every = max(1, count // measurements)
    ratios: dict[str, list[float]] = {}
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    with untouched(distiller):
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
        for place, batch in enumerate(batches):
            if place % every == 0:
                found = measure(distiller, batch, precision, distiller.weight_key)
                for term in found.terms:
                    ratios.setdefault(term.name, [])
                    if term.gradient and math.isfinite(term.gradient) and math.isfinite(found.task_gradient):
                        ratios[term.name].append(found.task_gradient / term.gradient)
            with precision():
                task = torch.cat(list(distiller.losses(batch, distill=False).task.values())).sum()
            optimizer.zero_grad()
            task.backward()
            if max_grad_norm:  # as in the trainer, where 0 is no clipping
                torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
    middles = {name: statistics.median(found) if found else math.nan for name, found in ratios.items()}
    return {key: middles.get(key) for key in distiller.loss_weights}
