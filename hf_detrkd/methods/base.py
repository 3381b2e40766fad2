"""What a distillation method is, and what all of them need: layer pairs, shared queries, per-layer bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..matching import Assigning, run_together
from ..outputs import DetectorOutput, DetectorSpec, ObjectQueries
from ..questions import Questions, Replies
from ..targets import BatchTotals, Targets


PARTS = ("class", "box", "giou")
"""What a query's answer is compared in, in the order of all stacked terms."""


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


@dataclass(frozen=True)
class PlacesConfig:
    """Options of every method that asks queries at places."""

    content: Literal["zero", "own"] = field(
        default="zero",
        metadata={
            "help": "What the decoders start from at a box: zeros [released code], or the model's own encoder token "
            "at that place, which two-stage detectors are trained with [ours]."
        },
    )


@dataclass(frozen=True)
class RandomPlacesConfig(PlacesConfig):
    """Options of every method that asks queries at random places: see [`random_queries`]."""

    general_distribution: Literal["normal_logit", "uniform"] = field(
        default="normal_logit",
        metadata={"help": "Random boxes: N(0, 1) before the sigmoid [released code], or uniform with sides >= 0.01."},
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


def layer_pairs(num_student: int, num_teacher: int) -> list[tuple[int, int, float]]:
    """Which teacher layer supervises which student layer: teacher layer t (from 1) teaches ceil(t * L_S / L_T).

    Returns:
        `list[tuple[int, int, float]]`: (student layer, teacher layer, weight) from 0; teacher layers that meet in one
        student layer share a weight of 1 (ours: their mean).
    """
    students = [-(-(t + 1) * num_student // num_teacher) - 1 for t in range(num_teacher)]
    return [(s, t, 1 / students.count(s)) for t, s in enumerate(students)]


def shared_fields(student: DetectorSpec, teacher: DetectorSpec) -> frozenset[str]:
    """Fields of the teacher's own queries that the student's decoder understands; empty if it understands none.

    Boxes and reference points mean the same to every model. Embeddings mean something only between models of one
    family and width.
    """
    if (student.family, student.width) == (teacher.family, teacher.width):
        return student.query_fields
    for place in ("boxes", "points"):
        if place in teacher.query_fields and takes_place(student, place):
            return frozenset({place})
    return frozenset()


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


def takes_place(spec: DetectorSpec, place: str) -> bool:
    """Whether a decoder can be asked at a place: a box serves where a point is wanted, never the other way."""
    return place in spec.query_fields or (place == "boxes" and "points" in spec.query_fields)


def teacher_queries(student: DetectorOutput, teacher: DetectorOutput, fields: frozenset[str]) -> ObjectQueries:
    """The teacher's own queries for the student: detached, with the encoder rows only where both share the grid."""
    queries = teacher.queries.detach()
    same_grid = [m.values.shape[-2:] for m in student.features["encoder"]] == [
        m.values.shape[-2:] for m in teacher.features["encoder"]
    ]
    return queries.select(fields | {"rows"} if same_grid else fields)


def zero_content(queries: ObjectQueries, width: int) -> ObjectQueries:
    """The same places with a content of zeros, `(batch_size, num_queries, width)`."""
    place = queries.points if queries.boxes is None else queries.boxes
    assert place is not None
    return replace(queries, content=place.new_zeros(*place.shape[:2], width), rows=None)


def with_content(queries: ObjectQueries, content: str, width: int) -> ObjectQueries:
    """Queries at a place, with what a decoder starts from there: `"zero"`, or `"own"`, which each model adds itself.
    Embeddings know no place and stay as they are."""
    return queries if content == "own" or queries.position is not None else zero_content(queries, width)


def shared_place(student: DetectorSpec, teacher: DetectorSpec) -> str | None:
    """The kind of place that both decoders can be asked at: `"boxes"`, `"points"`, or none."""
    return next((p for p in ("boxes", "points") if takes_place(student, p) and takes_place(teacher, p)), None)


def random_queries(
    place: str | None, count: int, distribution: str, example: DetectorOutput, generator: torch.Generator
) -> ObjectQueries:
    """One random set of queries for the whole batch, without content.

    Args:
        place (`str`, *optional*): `"boxes"` or `"points"` give boxes (a centre is a point); `None` gives position
            embeddings spread like the own ones of `example` (ours).
        count (`int`)
        distribution (`str`): of the boxes: `"normal_logit"`, N(0, 1) before the sigmoid, or `"uniform"` with sides of
            at least 0.01.
        example ([`DetectorOutput`]): for batch size, device and embeddings.
        generator (`torch.Generator`): on the CPU.
    """
    batch_size, device = example.layers[-1].boxes.shape[0], example.layers[-1].boxes.device
    if place is None:
        position = example.queries.position
        assert position is not None
        noise = torch.randn(count, position.shape[-1], generator=generator).to(device, non_blocking=True)
        own = position[0].detach().float()
        points = own.mean(0) + own.std(0) * noise
        return ObjectQueries(position=points.to(position.dtype).expand(batch_size, -1, -1))
    if distribution == "uniform":
        boxes = torch.rand(count, 4, generator=generator)
        boxes[:, 2:].clamp_(min=0.01)
    else:
        boxes = torch.randn(count, 4, generator=generator).sigmoid()
    return ObjectQueries(boxes=boxes.to(device, non_blocking=True).expand(batch_size, -1, -1))


def per_layer(name: str, values: Tensor, pairs: list[tuple[int, int, float]]) -> dict[str, Tensor]:
    """Scalars by name and student layer, from one value per layer pair `(num_pairs,)`."""
    losses: dict[str, Tensor] = {}
    for (layer, _, weight), value in zip(pairs, values.unbind(), strict=True):
        key = f"{name}_{layer}"
        losses[key] = losses[key] + weight * value if key in losses else weight * value
    return losses


def parts_per_layer(
    name: str, terms: Tensor, pairs: list[tuple[int, int, float]], group: str = ""
) -> dict[str, Tensor]:
    """Scalars `<name>_<part>[_<group>]_<layer>` from the terms of all parts, `(3, num_pairs)`."""
    losses: dict[str, Tensor] = {}
    for part, values in zip(PARTS, terms.unbind(), strict=True):
        losses |= per_layer(f"{name}_{part}{group and '_'}{group}", values, pairs)
    return losses
