"""What a distillation method is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..losses.matching import to_host
from ..structures.loss_key import LossKey
from ..structures.outputs import DetectorOutput, DetectorSpec
from ..structures.targets import BatchTotals, Targets
from .decoding import DecodedQueries, QueryRequests


@dataclass(frozen=True)
class Paper:
    """Where a method comes from; goes into the model card."""

    title: str
    arxiv: str
    citation: str


@dataclass(frozen=True)
class ComparingConfig:
    """Options of every method that compares a student with a teacher."""

    gate: Literal["none", "better"] = field(
        default="none",
        metadata={
            "help": "better: compare on objects alone, and there only what the teacher does better: classes where its "
            "score is higher, boxes where its IoU is [after Sun et al., task-adaptive regularization]."
        },
    )


class DistillationMethod(nn.Module):
    """Compares a student with its teacher. A method holds its projections and nothing else between calls.

    Args:
        config: an instance of `config_class`.
        student ([`DetectorSpec`])
        teacher ([`DetectorSpec`]): `None` for a method without one.

    Raises:
        ValueError: the pair cannot do what the config asks; the sentence says what to change.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper | None]
    config_class: ClassVar[type]
    groups: ClassVar[tuple[str, ...]] = ()
    """Names between part and layer in the keys of the losses, for those that have one."""
    needs_teacher: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ()
    """Names among the losses of what is logged and no loss."""

    def __init__(self, config: Any, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__()
        self.config = config

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each part by its name `<method>_<part>`, which begins the keys of the losses that it weighs."""
        raise NotImplementedError

    @property
    def gated(self) -> bool:
        """Whether a term may be zero because the teacher is nowhere better."""
        return vars(self.config).get("gate") == "better"

    def forward(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        targets: Targets,
        totals: BatchTotals,
        generator: torch.Generator,
    ) -> dict[LossKey, Tensor]:
        """Computes the unweighted losses of one batch by this method only: [`query_requests`], [`costs`] and
        [`losses`] in turn.

        Args:
            student ([`DetectorOutput`]): with gradient.
            teacher ([`DetectorOutput`]): without.
            targets ([`Targets`])
            totals ([`BatchTotals`]): divisors.
            generator (`torch.Generator`): on the CPU, seeded by the run's seed and step: equal on all processes.

        Returns:
            `dict[LossKey, torch.Tensor]`: scalars, and [`metrics`].
        """
        requests = self.query_requests(student, teacher, targets, generator)
        decoded = DecodedQueries(
            {name: student.decode(queries) for name, queries in requests.student.items()},
            {name: teacher.decode(queries) for name, queries in requests.teacher.items()},
        )
        with torch.autocast(targets.boxes.device.type, enabled=False):
            costs = self.costs(student, teacher, decoded, targets)
            return self.losses(student, teacher, decoded, targets, totals, to_host(costs))

    def query_requests(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, generator: torch.Generator
    ) -> QueryRequests:
        """Queries that the two decoders are to answer besides their own. Default: none.

        The requests of all methods of a step go through each decoder in one pass.
        """
        return QueryRequests()

    def costs(
        self, student: DetectorOutput, teacher: DetectorOutput, decoded: DecodedQueries, targets: Targets
    ) -> list[Tensor]:
        """Costs of the assignments that [`losses`] needs. Default: none.

        The costs of all methods and of the detection loss go to the host in one copy. Called without autocast.

        Args:
            student, teacher ([`DetectorOutput`])
            decoded ([`DecodedQueries`]): predictions for [`query_requests`].
            targets ([`Targets`])
        """
        return []

    def losses(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        decoded: DecodedQueries,
        targets: Targets,
        totals: BatchTotals,
        host_costs: list[np.ndarray],
    ) -> dict[LossKey, Tensor]:
        """The unweighted losses of one batch; what every method implements. Called without autocast.

        Args:
            student, teacher ([`DetectorOutput`])
            decoded ([`DecodedQueries`]): predictions for [`query_requests`].
            targets ([`Targets`])
            totals ([`BatchTotals`]): divisors.
            host_costs (`list[np.ndarray]`): the [`costs`] on the host, in their order.

        Returns:
            `dict[LossKey, torch.Tensor]`: scalars, and [`metrics`].
        """
        raise NotImplementedError


def checked_losses(method: DistillationMethod, losses: object) -> dict[LossKey, Tensor]:
    """The losses of a method, if they are what the distiller can weigh.

    Raises:
        TypeError: they are no dictionary of scalars by [`LossKey`].
    """
    wanted = f"{type(method).__name__}.losses must return a dict of scalar tensors by LossKey"
    if not isinstance(losses, dict):
        raise TypeError(f"{wanted}, got a {type(losses).__name__}: write it with `return`, not with `yield`.")
    for key, value in losses.items():
        if not isinstance(key, LossKey) or not isinstance(value, Tensor) or value.ndim:
            shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise TypeError(f"{wanted}, got {key!r} ({type(key).__name__}): a {type(value).__name__}{shape}.")
    return losses


def refuse_many_to_one(method: str, student: DetectorSpec, teacher: DetectorSpec | None = None) -> None:
    """
    Raises:
        ValueError: a detector of which several boxes answer for one object.
    """
    pair = f"A {student.family} student" + (f" and a {teacher.family} teacher" if teacher else "")
    for spec in (student, teacher):
        if spec is not None and not spec.one_to_one:
            raise ValueError(
                f"{pair} cannot do {method}, which matches every object with one query: in {spec.family} all boxes "
                "that overlap it answer for it; choose --method kd_detr, clockdistill or task_adaptive."
            )
