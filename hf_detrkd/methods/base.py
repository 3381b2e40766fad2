"""What a distillation method is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..matching import Assigning, run_together
from ..outputs import DetectorOutput, DetectorSpec
from ..questions import Questions, Replies
from ..targets import BatchTotals, Targets


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
    ) -> dict[str, Tensor]:
        """Computes the unweighted losses of one batch: [`questions`] and [`steps`], alone.

        Args:
            student ([`DetectorOutput`]): with gradient.
            teacher ([`DetectorOutput`]): without.
            targets ([`Targets`])
            totals ([`BatchTotals`]): divisors.
            generator (`torch.Generator`): on the CPU, seeded by the run's seed and step: equal on all processes.

        Returns:
            `dict[str, torch.Tensor]`: scalars by name `<method>_<part>[_<group>]_<layer>`, and [`metrics`].
        """
        asked = self.questions(student, teacher, targets, generator)
        replies = Replies(
            {name: student.decode(queries) for name, queries in asked.student.items()},
            {name: teacher.decode(queries) for name, queries in asked.teacher.items()},
        )
        return run_together(self.steps(student, teacher, replies, targets, totals))[0]

    def questions(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, generator: torch.Generator
    ) -> Questions:
        """What a method asks the two decoders beside their own queries: all methods of a step ask together."""
        return Questions()

    def steps(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        replies: Replies,
        targets: Targets,
        totals: BatchTotals,
    ) -> Assigning[dict[str, Tensor]]:
        """What a method writes: the losses, from the models' own answers and from those to its questions.

        It yields once, the costs of its assignments (an empty list where it has none), and is sent them on the host.
        So all assignments of a training step share one copy: see [`~hf_detrkd.matching.run_together`].
        """
        raise NotImplementedError


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
