"""Which parts of a teacher's output are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


IN_MAPS = frozenset({"rows"})
"""Fields of queries that depend on the batch where images are padded."""

STILL = IN_MAPS | {"content", "position"}
"""Fields of queries that do not move with an augmented image."""


@dataclass(frozen=True)
class TeacherParts:
    """The parts of a teacher's output that a method reads, so that nothing else has to be stored.

    Attributes:
        all_layers (`bool`): predictions of every decoder layer for the teacher's own queries; otherwise of the last.
        states (`bool`): the decoder states of these predictions.
        queries (`frozenset[str]`): fields of the teacher's own queries.
        features (`frozenset[str]`): names of feature maps, which are large.
        per_box (`frozenset[str]`): requests to the teacher with one query per ground-truth box.
        moves (`bool`): the method reads the teacher's predictions for its own queries alone, and leaves out those
            without a score, so that they may move with the image, and lose their score where the view does not show
            them.
        merges (`bool`): the method compares query by query, so that the queries of several teachers can be put side by
            side.
        missing (`str`, *optional*): why the method cannot use stored answers; `None` if it can.
    """

    all_layers: bool = True
    states: bool = True
    queries: frozenset[str] = frozenset()
    features: frozenset[str] = frozenset()
    per_box: frozenset[str] = frozenset()
    moves: bool = False
    merges: bool = False
    missing: str | None = None

    @classmethod
    def union(cls, parts: Iterable[TeacherParts]) -> TeacherParts:
        """What several methods read together."""
        every = list(parts)
        return cls(
            any(part.all_layers for part in every),
            any(part.states for part in every),
            frozenset().union(*(part.queries for part in every)),
            frozenset().union(*(part.features for part in every)),
            frozenset().union(*(part.per_box for part in every)),
            all(part.moves for part in every),
            all(part.merges for part in every),
            next((part.missing for part in every if part.missing is not None), None),
        )
