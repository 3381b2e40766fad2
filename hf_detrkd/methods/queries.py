"""Builds queries that both decoders accept: teacher queries and random reference boxes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from ..structures.outputs import DetectorOutput, DetectorSpec, ObjectQueries


@dataclass(frozen=True)
class PlacesConfig:
    """Options of all methods that decode queries at given boxes or points."""

    content: Literal["own", "zero", "teacher"] | None = field(
        default=None,
        metadata={
            "help": "Initial content of queries at boxes. own: each model's own content, such as the encoder token "
            "at the box, which two-stage detectors are trained with [ours]; zero: zeros in both models [released "
            "code, whose detectors have no other]; teacher: KD-DETR's specific points have the teacher's content, for "
            "models of one family and width [re-implementation for DINO], all other queries their own. Default: "
            "own; zero at the proposals of a student that has no queries, where teachers were measured to predict "
            "better [ours].",
        },
    )

    def content_for(self, one_to_one: bool) -> str:
        """The chosen content, or the default of a student with queries or with proposals."""
        return self.content or ("own" if one_to_one else "zero")

    def asked_content(self, one_to_one: bool) -> str:
        """The content that the teacher is asked with at further places: zeros, or its own."""
        return "zero" if self.content_for(one_to_one) == "zero" else "own"


@dataclass(frozen=True)
class RandomPlacesConfig(PlacesConfig):
    """Options of all methods that decode random queries: see [`random_queries`]."""

    general_distribution: Literal["normal_logit", "uniform"] = field(
        default="normal_logit",
        metadata={
            "help": "Distribution of random boxes. normal_logit: N(0, 1) before the sigmoid [released code]; uniform: "
            "uniform in [0, 1] with sides of at least 0.01. Default: normal_logit."
        },
    )


def takes_place(spec: DetectorSpec, place: str) -> bool:
    """True if a decoder accepts queries at boxes or points: a box can replace a point, but not vice versa."""
    return place in spec.query_fields or (place == "boxes" and "points" in spec.query_fields)


def shared_place(student: DetectorSpec, teacher: DetectorSpec) -> str | None:
    """Kind of reference that both decoders accept: `"boxes"`, `"points"` or `None`."""
    return next((p for p in ("boxes", "points") if takes_place(student, p) and takes_place(teacher, p)), None)


def shared_fields(student: DetectorSpec, teacher: DetectorSpec) -> frozenset[str]:
    """Fields of the teacher's own queries that the student's decoder accepts; empty if there are none.

    Boxes and reference points have the same meaning in every model. Embeddings can be shared only by models of the
    same family and width.
    """
    if (student.family, student.width) == (teacher.family, teacher.width):
        return student.query_fields
    for place in ("boxes", "points"):
        if place in teacher.query_fields and takes_place(student, place):
            return frozenset({place})
    return frozenset()


def teacher_queries(student: DetectorOutput, teacher: DetectorOutput, fields: frozenset[str]) -> ObjectQueries:
    """The teacher's own queries for the student: detached, with `rows` only if both encoders have the same grid."""
    queries = teacher.queries.detach()
    same_grid = [m.values.shape[-2:] for m in student.features["encoder"]] == [
        m.values.shape[-2:] for m in teacher.features["encoder"]
    ]
    return queries.select(fields | {"rows"} if same_grid else fields)


def zero_content(queries: ObjectQueries, width: int) -> ObjectQueries:
    """The same queries with a content of zeros, `(batch_size, num_queries, width)`."""
    place = queries.points if queries.boxes is None else queries.boxes
    assert place is not None
    return replace(queries, content=place.new_zeros(*place.shape[:2], width), rows=None)


def with_content(queries: ObjectQueries, content: str, width: int) -> ObjectQueries:
    """Queries with their initial content: zeros for `"zero"`; otherwise unchanged, since each model adds its own where
    there is none. Queries with position embeddings are returned unchanged."""
    return zero_content(queries, width) if content == "zero" and queries.position is None else queries


def random_queries(
    place: str | None, count: int, distribution: str, example: DetectorOutput, generator: torch.Generator
) -> ObjectQueries:
    """One random set of queries for the whole batch, without content.

    Args:
        place (`str`, *optional*): `"boxes"` or `"points"` give boxes (the centre is the point); `None` gives position
            embeddings with the mean and standard deviation of those of `example` (ours).
        count (`int`): number of queries.
        distribution (`str`): distribution of the boxes: `"normal_logit"`, N(0, 1) before the sigmoid, or `"uniform"`
            with sides of at least 0.01.
        example ([`DetectorOutput`]): provides batch size, device and embeddings.
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
