"""Extra decoder queries requested by the methods, batched into one decoder pass per model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from ..structures.outputs import DetectorOutput, ObjectQueries, Predictions


Layers = tuple[Predictions, ...]

MAX_GROUPS = 1024  # upper bound on the number of groups within one set of queries


@dataclass(frozen=True)
class QueryRequests:
    """Extra queries for each of the two models, by names that the method chooses."""

    student: Mapping[str, ObjectQueries] = field(default_factory=dict)
    teacher: Mapping[str, ObjectQueries] = field(default_factory=dict)


@dataclass(frozen=True)
class DecodedQueries:
    """Predictions of every decoder layer for the extra queries, and the student's queries, by the names of the
    requests."""

    student: Mapping[str, Layers]
    teacher: Mapping[str, Layers]
    asked: Mapping[str, ObjectQueries]


def decode_requests(
    requests: Sequence[QueryRequests],
    student: DetectorOutput,
    teacher: DetectorOutput | None,
    names: Sequence[str] = (),
) -> list[DecodedQueries]:
    """Decodes the requests of several methods, with one decoder pass per model for all queries with the same fields.

    Args:
        requests (`Sequence[QueryRequests]`): requests of each method.
        student, teacher ([`DetectorOutput`]): `teacher` may be `None` if no method has requests for it.
        names (`Sequence[str]`): names of the methods, by which a stored output has its predictions.

    Returns:
        `list[DecodedQueries]`: predictions for each method.
    """
    own = _decode_one(student, [one.student for one in requests])
    if teacher is not None and teacher.decoded is not None:
        stored = teacher.decoded
        theirs = [
            {name: stored[f"{method}/{name}"] for name in one.teacher}
            for method, one in zip(names, requests, strict=True)
        ]
    else:
        theirs = _decode_one(teacher, [one.teacher for one in requests])
    asked = [one.student for one in requests]
    return [DecodedQueries(*each) for each in zip(own, theirs, asked, strict=True)]


def _decode_one(model: DetectorOutput | None, asked: Sequence[Mapping[str, ObjectQueries]]) -> list[dict[str, Layers]]:
    """Predictions of one model for the requests of each method."""
    every = [queries for one in asked for queries in one.values()]
    answers = iter(decode_together(model.decode, every) if model is not None else [])
    return [{name: next(answers) for name in one} for one in asked]


def decode_together(decode: Callable[[ObjectQueries], Layers], asked: Sequence[ObjectQueries]) -> list[Layers]:
    """Predictions for several sets of queries, equal to those of decoding each set separately.

    Sets with the same fields are concatenated for one decoder pass and separated by [`ObjectQueries.groups`].

    Args:
        decode: see [`DetectorOutput`].
        asked (`Sequence[ObjectQueries]`)
    """
    alike: dict[frozenset[str], list[int]] = {}
    for place, queries in enumerate(asked):
        alike.setdefault(queries.fields - {"groups"}, []).append(place)
    answers: dict[int, Layers] = {}
    for places in alike.values():
        sets = [asked[place] for place in places]
        whole = decode(sets[0] if len(sets) == 1 else _joined(sets))
        sizes = [queries.size for queries in sets]
        split = [_split(layer, sizes) for layer in whole]
        answers |= {place: tuple(layer[i] for layer in split) for i, place in enumerate(places)}
    return [answers[place] for place in range(len(asked))]


def _joined(sets: Sequence[ObjectQueries]) -> ObjectQueries:
    """Concatenates sets of queries with the same fields, with group numbers that keep the sets separate."""
    numbers = []
    for i, queries in enumerate(sets):
        example = next(iter(queries.tensors.values()))
        own = torch.zeros(example.shape[:2], dtype=torch.long, device=example.device)
        numbers.append((own if queries.groups is None else queries.groups) + i * MAX_GROUPS)
    names = sets[0].fields - {"groups"}
    values = {name: torch.cat([queries.tensors[name] for queries in sets], 1) for name in names}
    return ObjectQueries(**values, groups=torch.cat(numbers, 1))


def _split(layer: Predictions, sizes: Sequence[int]) -> list[Predictions]:
    ends = list(accumulate(sizes))
    return [layer.rows(end - size, end) for size, end in zip(sizes, ends, strict=True)]
