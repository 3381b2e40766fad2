"""Base class of the distillation methods."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..losses.matching import to_host
from ..structures.loss_key import LossKey
from ..structures.outputs import DetectorOutput, DetectorSpec
from ..structures.targets import BatchTotals, Targets
from ..structures.teacher_parts import TeacherParts
from .decoding import DecodedQueries, QueryRequests


@dataclass(frozen=True)
class Paper:
    """Reference of a method, cited in the model card."""

    title: str
    arxiv: str
    citation: str


@dataclass(frozen=True)
class ComparingConfig:
    """Options of all methods that compare student and teacher predictions."""

    gate: Literal["none", "better"] = field(
        default="none",
        metadata={
            "help": "better: distil only objects that the teacher predicts better: classes where its score is higher, "
            "boxes where its IoU is higher [after Sun et al., task-adaptive regularization]. Default: none."
        },
    )


class DistillationMethod(nn.Module):
    """Computes losses between a student and its teacher. Projections are the only state that it keeps between calls.

    Args:
        config: an instance of `config_class`.
        student ([`DetectorSpec`])
        teacher ([`DetectorSpec`]): `None` for a method without a teacher.

    Raises:
        ValueError: the pair does not support the config; the message says what to change.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper | None]
    config_class: ClassVar[type]
    groups: ClassVar[tuple[str, ...]] = ()
    """Possible values of [`LossKey.group`] in the losses."""
    needs_teacher: ClassVar[bool] = True
    published: ClassVar[dict[str, Any]] = {}
    """Options of the paper or its released code where our defaults differ, for `--preset paper`."""
    schedule: ClassVar[str] = "constant"
    """Default shape of the [`~hf_detrkd.distillation.schedule.DistillationSchedule`] of its weight."""
    metrics: ClassVar[tuple[str, ...]] = ()
    """Keys in the result of [`losses`] that are only logged and not part of the loss."""

    def __init__(self, config: Any, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__()
        self.config = config

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each part by its name `<method>_<part>`; it applies to all losses whose key starts with it."""
        raise NotImplementedError

    @property
    def reads(self) -> TeacherParts:
        """The parts of the teacher's output that the method reads. Default: everything."""
        return TeacherParts(
            queries=frozenset({"content", "position", "points", "boxes", "rows"}),
            features=frozenset({"neck", "encoder"}),
        )

    @property
    def questions(self) -> dict[str, Any]:
        """Options that change what the teacher is asked besides its own queries, empty if it is asked nothing;
        answers that are stored with other ones do not fit. Default: all options."""
        return dataclasses.asdict(self.config)

    def asked_of(self, pseudo_threshold: float | None) -> dict[str, Any]:
        """[`questions`], and for those at boxes the threshold by which the teacher's detections become the boxes of
        images without labels; `None` without such images."""
        if pseudo_threshold is None or not self.reads.per_box:
            return self.questions
        return self.questions | {"pseudo_threshold": pseudo_threshold}

    @property
    def gated(self) -> bool:
        """True if a loss may be zero because the teacher is not better for any object."""
        return vars(self.config).get("gate") == "better"

    def forward(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        targets: Targets,
        totals: BatchTotals,
        generator: torch.Generator,
    ) -> dict[LossKey, Tensor]:
        """Computes the unweighted losses of one batch for this method only: calls [`query_requests`], the decoders,
        [`costs`] and [`losses`].

        Args:
            student ([`DetectorOutput`]): with gradient.
            teacher ([`DetectorOutput`]): without gradient.
            targets ([`Targets`])
            totals ([`BatchTotals`]): divisors.
            generator (`torch.Generator`): on the CPU, seeded with the run's seed and step: equal on all processes.

        Returns:
            `dict[LossKey, torch.Tensor]`: scalar losses, and [`metrics`].
        """
        requests = self.query_requests(student, teacher, targets, generator)
        decoded = DecodedQueries(
            {name: student.decode(queries) for name, queries in requests.student.items()},
            {name: teacher.decode(queries) for name, queries in requests.teacher.items()},
            requests.student,
        )
        with torch.autocast(targets.boxes.device.type, enabled=False):
            costs = self.costs(student, teacher, decoded, targets)
            return self.losses(student, teacher, decoded, targets, totals, to_host(costs))

    def query_requests(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, generator: torch.Generator
    ) -> QueryRequests:
        """Extra queries for the two decoders, in addition to the models' own. Default: none.

        The requests of all methods of a step are batched into one pass per decoder.
        """
        return QueryRequests()

    def costs(
        self, student: DetectorOutput, teacher: DetectorOutput, decoded: DecodedQueries, targets: Targets
    ) -> list[Tensor]:
        """Matching costs of the assignments that [`losses`] needs. Default: none.

        The costs of all methods and of the detection loss are copied to the host together. Called without autocast.

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
        """Computes the unweighted losses of one batch; every method implements it. Called without autocast.

        Args:
            student, teacher ([`DetectorOutput`])
            decoded ([`DecodedQueries`]): predictions for [`query_requests`].
            targets ([`Targets`])
            totals ([`BatchTotals`]): divisors.
            host_costs (`list[np.ndarray]`): the [`costs`] on the host, in the same order.

        Returns:
            `dict[LossKey, torch.Tensor]`: scalar losses, and [`metrics`].
        """
        raise NotImplementedError


def checked_costs(method: DistillationMethod, costs: object) -> list[Tensor]:
    """The costs of a method, if they are a list of tensors.

    Raises:
        TypeError: they are something else, such as a generator.
    """
    if not isinstance(costs, list) or not all(isinstance(cost, Tensor) for cost in costs):
        raise TypeError(f"{type(method).__name__}.costs must return a list of tensors, got a {type(costs).__name__}.")
    return costs


def checked_losses(method: DistillationMethod, losses: object) -> dict[LossKey, Tensor]:
    """Returns the losses of a method after checking their type.

    Raises:
        TypeError: they are not a dictionary from [`LossKey`] to scalar tensors.
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
    """Raises an error if a detector is not one-to-one.

    Raises:
        ValueError: a detector that predicts one object from several boxes.
    """
    pair = f"A {student.family} student" + (f" and a {teacher.family} teacher" if teacher else "")
    for spec in (student, teacher):
        if spec is not None and not spec.one_to_one:
            raise ValueError(
                f"{pair} cannot use {method}, which matches every object with one query: {spec.family} predicts it "
                "from every box that overlaps it; choose --method kd_detr, clockdistill or task_adaptive."
            )
