"""Compares every distillation term with the detection loss while the student is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from transformers.utils import logging

from ..distillation.distiller import Distiller
from ..structures.loss_key import GRADIENT_SUFFIX, LossKey
from ..structures.targets import is_labeled
from .loss_probe import Precision, probe


logger = logging.get_logger(__name__)

MEASURED = 2  # images
PATIENCE = 10  # logs in which a term exceeds the detection loss before the warning


class TermWatch:
    """Measures gradient ratios every few steps, and warns of a term that exceeds the detection loss for long.

    Args:
        distiller ([`Distiller`])
        every (`int`): optimizer steps between two measurements of the gradients; 0 for none.
    """

    def __init__(self, distiller: Distiller, every: int):
        self.distiller, self.every = distiller, every
        # values that a method only reports have no weight
        self._reported = {name for method in distiller.methods.values() for name in cast(Any, method).metrics}
        self._measured: int | None = None  # the step of the last measurement
        self._ratios: dict[str, float] = {}
        self._weights: Mapping[str, float] = {}  # of the last step
        self._exceeded: Counter[str] = Counter()

    def look(self, step: int, batch: Mapping[str, Any], weights: Mapping[str, float], precision: Precision) -> bool:
        """Measures the gradients if this step is due, at its first micro-batch: no gradient is accumulated yet.

        The measurement uses few images, so that a batch that fits the device's memory still does, and it needs no
        other process.

        Args:
            step (`int`): number of completed optimizer steps.
            batch (`dict`): input of the distiller, on its device.
            weights (`dict[str, float]`): factor of each method's losses at this step.
            precision: see [`Precision`].

        Returns:
            `bool`: true if it measured.
        """
        self._weights = weights
        due = self.every and step and step % self.every == 0 and step != self._measured
        if not due or not any(weights.values()):
            return False
        self._measured = step
        found = probe(self.distiller, part_of(batch), precision)
        for term in found.terms:
            if found.task_gradient:
                share = weights[cast(LossKey, term.name).method] * term.gradient / found.task_gradient
                self._ratios[f"{term.name}{GRADIENT_SUFFIX}"] = share
        return True

    def entries(self, parts: Mapping[str, float]) -> dict[str, float]:
        """What a log gets besides the mean parts of the loss: the ratios of gradient norms to the task's, if measured
        since the last one. Warns of a term that has exceeded the detection loss in [`PATIENCE`] logs without a break.

        Args:
            parts (`dict[str, float]`): mean losses since the last log, by name.
        """
        terms = [name for name in parts if isinstance(name, LossKey) and name.method != "task"]
        for key in (term for term in terms if term not in self._reported):
            weighted = self._weights.get(key.method, 0.0) * self.distiller.weight_of(key) * parts[key]
            self._exceeded[key] = self._exceeded[key] + 1 if weighted > parts["task_loss"] else 0
            if self._exceeded[key] == PATIENCE:
                logger.warning(
                    f"{key} has exceeded the detection loss in the last {PATIENCE} logs ({weighted:.3g} against "
                    f"{parts['task_loss']:.3g}), so the student mostly learns this term: lower its weight with "
                    f"--loss_weights '{{\"{key}\": ...}}', or start with --calibrate_weights auto."
                )
        ratios, self._ratios = self._ratios, {}
        return ratios


def part_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The images of a batch with most boxes, with divisors of their own; the first one has labels, if any has, since
    the others give no gradient of the task."""
    counts = [len(label["class_labels"]) for label in batch["labels"]]
    order = sorted(range(len(counts)), key=lambda row: -counts[row])
    labeled = [row for row in order if is_labeled(batch["labels"][row])][:1]
    rows = [*labeled, *(row for row in order if row not in labeled)][:MEASURED]
    images = {n: v[rows] if isinstance(v, Tensor) else v for n, v in batch.items() if n not in ("labels", "totals")}
    return images | {"labels": [batch["labels"][row] for row in rows]}
