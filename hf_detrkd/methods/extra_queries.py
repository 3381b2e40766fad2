"""Control experiment for KD-DETR: extra random queries supervised by the ground truth, without a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..losses.matching import match_columns, to_device
from ..structures.loss_key import LossKey
from ..structures.outputs import DetectorOutput, DetectorSpec, stacked
from ..structures.targets import BatchTotals, Targets
from .base import DistillationMethod, refuse_many_to_one
from .decoding import DecodedQueries, QueryRequests
from .detection_losses import MATCHER, supervised_losses, supervision_of
from .queries import RandomPlacesConfig, random_queries, takes_place, with_content


@dataclass(frozen=True)
class ExtraQueriesConfig(RandomPlacesConfig):
    """Options of the control experiment."""

    extra_queries: int = field(
        default=600,
        metadata={
            "help": "Number of random queries per step; use the number of points of the compared run. Default: 600. "
            "[ours]"
        },
    )

    def __post_init__(self) -> None:
        if self.extra_queries < 1:
            raise ValueError(f"extra_queries must be at least 1, got {self.extra_queries}.")


class ExtraQueries(DistillationMethod):
    """Random queries in the student's decoder, matched with the ground truth in every layer (ours).

    The queries are those of KD-DETR's general points. A gain of this control comes from more queries and not from the
    teacher: a distillation method has to exceed it. Losses and weights are those of the student's own queries.

    Requirements:
        A student whose decoder accepts external queries.
    """

    name = "extra_queries"
    paper = None
    config_class = ExtraQueriesConfig
    needs_teacher = False

    def __init__(self, config: ExtraQueriesConfig, student: DetectorSpec, teacher: DetectorSpec | None = None):
        super().__init__(config, student, teacher)  # type: ignore[arg-type]
        refuse_many_to_one("extra_queries", student)
        self.config: ExtraQueriesConfig = config
        self.student, self.supervision = student, supervision_of(student)
        self.place = next((place for place in ("boxes", "points") if takes_place(student, place)), None)
        if self.place is None and "position" not in student.query_fields:
            raise ValueError(
                f"extra_queries needs a decoder that accepts external queries, but {student.family} has none: "
                "choose --method none."
            )

    @property
    def weights(self) -> dict[str, float]:
        return {f"extra_queries_{part}": weight for part, weight in self.supervision.weights.items()}

    def query_requests(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput | None,
        targets: Targets,
        generator: torch.Generator,
    ) -> QueryRequests:
        count, distribution = self.config.extra_queries, self.config.general_distribution
        queries = random_queries(self.place, count, distribution, student, generator)
        return QueryRequests({"extra": with_content(queries, self.config.content_for(True), self.student.width)})

    def costs(
        self, student: DetectorOutput, teacher: DetectorOutput | None, decoded: DecodedQueries, targets: Targets
    ) -> list[Tensor]:
        return [MATCHER.cost_of_layers(decoded.student["extra"], targets)]

    def losses(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput | None,
        decoded: DecodedQueries,
        targets: Targets,
        totals: BatchTotals,
        host_costs: list[np.ndarray],
    ) -> dict[LossKey, Tensor]:
        layers = decoded.student["extra"]
        answers = stacked(layers)
        (index,) = to_device([match_columns(host_costs[0], targets.counts)], answers.boxes.device)
        pairs = [(layer, layer, 1.0) for layer in range(len(layers))]
        key = partial(LossKey, self.name)
        return supervised_losses(key, answers, index, targets, totals, self.supervision, pairs)
