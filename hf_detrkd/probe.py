"""What every term of a loss does to the student: measured once before training, or to choose its weight."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .distiller import Distiller, without_layer


Precision = Callable[[], AbstractContextManager[Any]]
"""Makes the context in which a forward pass runs (autocast)."""


@dataclass(frozen=True)
class Term:
    """One term of the loss.

    Attributes:
        name (`str`): without layer; the values are sums over layers.
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
    """The terms of one batch beside the task loss and the norm of its gradient."""

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

    def refuse_silence(self, weights: Mapping[str, float]) -> None:
        """
        Args:
            weights (`dict[str, float]`): of the terms by name; those at 0 were switched off on purpose.

        Raises:
            ValueError: a term is not finite, is zero, or sends no gradient to the student; or all are switched off.
        """
        faults = [
            f"{term.name} is {fault}"
            for term in self.terms
            if weights[term.name] and (fault := _fault(term.value, term.gradient))
        ]
        if self.terms and not any(weights.values()):
            faults.append("every term has the weight 0")
        if faults:
            raise ValueError(
                f"Distillation would not teach as it should: {'; '.join(faults)}. Look at the class map, the "
                "teacher's preprocessing, frozen parameters and --loss_weights; a term with the weight 0 is left out "
                f"of this check, and --probe false switches it off.\n{self.table()}"
            )


def _fault(value: float, gradient: float) -> str | None:
    if not math.isfinite(value):
        return f"{value}"
    if not math.isfinite(gradient):
        return f"{value:.4g}, and its gradient {gradient}"
    if value == 0:
        return "zero"
    return "without gradient to the student" if gradient == 0 else None


def ratio(value: float, whole: float) -> float:
    """A quotient that is NaN where there is nothing to divide by."""
    return value / whole if whole else math.nan


def probe(distiller: Distiller, batch: Mapping[str, Any], precision: Precision) -> Probe:
    """Measures the terms of one batch; model, buffers and random numbers stay as they were.

    Args:
        distiller ([`Distiller`])
        batch (`dict`): what the distiller takes, on its device.
        precision: see [`Precision`].
    """
    with untouched(distiller):
        return measure(distiller, batch, precision, without_layer)


def measure(
    distiller: Distiller, batch: Mapping[str, Any], precision: Precision, group: Callable[[str], str]
) -> Probe:
    """The terms of one batch, summed over the losses that `group` gives one name; one copy from the device."""
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    with precision():
        found = distiller.losses(**batch)
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
    """Norm of the gradient of a scalar, a scalar; 0 where it has none."""
    if not value.requires_grad:
        return torch.zeros((), device=value.device)
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
    return torch.stack(norms).norm() if norms else torch.zeros((), device=value.device)


@contextmanager
def untouched(distiller: Distiller) -> Iterator[None]:
    """Inside, the distiller trains; afterwards its weights, buffers, mode and the random state are as before."""
    state = {name: value.detach().clone() for name, value in distiller.state_dict().items()}
    mode = distiller.training
    with torch.random.fork_rng():
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
    fraction: float,
    learning_rate: float,
    max_grad_norm: float,
    precision: Precision,
    measurements: int = 20,
) -> dict[str, float]:
    """Weights with which every term's gradient is a given fraction of the task loss's.

    The student is trained by the task loss alone for the batches, since the first step says little, and put back
    afterwards. At evenly spaced steps the norms of all gradients are measured; a weight follows their median.

    Args:
        distiller ([`Distiller`])
        batches: a list of what the distiller takes, on its device.
        fraction (`float`): norm of each term's gradient over that of the task loss's, both on the student's
            parameters.
        learning_rate, max_grad_norm (`float`): of the training.
        precision: see [`Precision`].
        measurements (`int`): how many steps are measured at most.

    Returns:
        `dict[str, float]`: a weight for each key of `distiller.loss_weights` that weighs a loss of this run; a weight
        of 0 stays 0.

    Raises:
        ValueError: a term whose gradient is never there.
    """
    batches = list(batches)
    every = max(1, len(batches) // measurements)
    ratios: dict[str, list[float]] = {}
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    with untouched(distiller):
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
        for place, batch in enumerate(batches):
            if place % every == 0:
                found = measure(distiller, batch, precision, distiller.weight_key)
                for term in found.terms:
                    if term.gradient and math.isfinite(term.gradient):
                        ratios.setdefault(term.name, []).append(found.task_gradient / term.gradient)
                silent = [t.name for t in found.terms if distiller.loss_weights[t.name] and t.name not in ratios]
            with precision():
                task = torch.cat(list(distiller.losses(**batch, distill=False).task.values())).sum()
            optimizer.zero_grad()
            task.backward()
            torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
    if silent:
        raise ValueError(f"No weight can be found for {', '.join(silent)}: no gradient reached the student.")
    return {name: fraction * statistics.median(r) * distiller.loss_weights[name] for name, r in ratios.items()}
