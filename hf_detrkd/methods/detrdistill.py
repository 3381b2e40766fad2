"""DETRDistill: Hungarian-matched logits, target-aware features, and the teacher's queries as a prior."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..losses.functional import among_known, box_losses, class_targets, gather_matched, soft_class_loss
from ..losses.matching import (
    HungarianMatcher,
    match_columns,
    pair_positives_first,
    positives,
    to_device,
)
from ..structures.loss_key import LossKey
from ..structures.outputs import DetectorOutput, DetectorSpec, Predictions, stacked
from ..structures.targets import BatchTotals, Targets
from ..structures.teacher_parts import TeacherParts
from .base import ComparingConfig, DistillationMethod, Paper, refuse_many_to_one
from .decoding import DecodedQueries, QueryRequests
from .detection_losses import MATCHER, supervised_losses, supervision_of
from .features import cells_of, feature_masks, nearest_level, on_the_grid_of, projections, query_directions, real_cells
from .gates import better_answers, better_objects
from .layer_mapping import PARTS, layer_pairs, per_layer, stacked_pairs
from .queries import shared_fields, teacher_queries


PAIRING = HungarianMatcher(class_weight=1.0, box_weight=5.0, giou_weight=2.0)  # student and teacher [released code]


@dataclass(frozen=True)
class DETRDistillConfig(ComparingConfig):
    """Options of DETRDistill. Defaults are those of the paper or the released code where these are known."""

    variant: Literal["paper", "released"] = field(
        default="paper",
        metadata={
            "help": "paper: positives and negatives are matched separately, and the teacher's assignment supervises "
            "its queries; released: one matching of all queries, and the student's own assignment. Default: paper."
        },
    )
    logits_weight: float = field(
        default=0.2,
        metadata={
            "help": "Weight of the logits loss; 0 disables it. With 1 it slows a student that starts from random "
            "weights. Default: 0.2. [ours; released: 1]"
        },
    )
    feature_weight: float = field(
        default=1.0, metadata={"help": "Weight of the feature loss; 0 disables it. Default: 1. [released: 1]"}
    )
    assignment_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the detection loss of the teacher's queries in the student; 0 disables it. Default: 1. "
            "[released: 1]"
        },
    )
    feature_level: Literal["neck", "encoder"] = field(
        default="neck",
        metadata={
            "help": "Distilled feature maps: neck, the input of the encoder [released code], or encoder, its output "
            "[figure of the paper]. Default: neck."
        },
    )
    gamma: float = field(
        default=0.5,
        metadata={
            "help": "Exponent in [0, 1] of the query quality score^gamma * IoU^(1 - gamma), for variant paper only. "
            "Default: 0.5. [ours]"
        },
    )

    def __post_init__(self) -> None:
        weights = (self.logits_weight, self.feature_weight, self.assignment_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(f"DETRDistill's weights must be at least 0 and one of them above 0, got {weights}.")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {self.gamma}.")


class DETRDistill(DistillationMethod):
    """Hungarian-matching logits, target-aware features and query-prior assignment distillation.

    * logits: student and teacher predictions are paired by Hungarian matching, layer by layer; class and box losses
      are computed per pair. In the paper's variant, positives (queries that the teacher's own matching assigns to an
      object) are paired first; negatives are paired among the rest and get only box losses.
    * feature: squared distance of feature maps, weighted by a mask of their similarity to the teacher's best queries.
    * assignment: the student decodes the *teacher's* queries, supervised by the ground truth through the teacher's
      assignment.

    Requirements:
        For `assignment_weight` above 0, queries that both decoders accept. For `feature_weight` above 0, teacher
        feature maps as wide as its decoder states.

    References:
        Chang et al., DETRDistill: A Universal Knowledge Distillation Framework for DETR-families, ICCV 2023,
        https://arxiv.org/abs/2211.10156

    Relations:
        [`KDDETR`] decodes the same queries with both models, which needs no matching.

    Example:
        ```python
        >>> method = DETRDistill(DETRDistillConfig(feature_weight=0.0), student.spec, teacher.spec)
        >>> losses = method(student_output, teacher_output, targets, totals, torch.Generator())
        ```
    """

    name = "detrdistill"
    paper = Paper(
        "DETRDistill: A Universal Knowledge Distillation Framework for DETR-families",
        "2211.10156",
        "@inproceedings{chang2023detrdistill, title={DETRDistill: A Universal Knowledge Distillation Framework for "
        "DETR-families}, author={Chang, Jiahao and Wang, Shuo and Xu, Hai-Ming and Chen, Zehui and Yang, Chenhongyi "
        "and Zhao, Feng}, booktitle={ICCV}, year={2023}}",
    )
    config_class = DETRDistillConfig
    published = {"logits_weight": 1.0}
    groups = ("positive", "negative")

    def __init__(self, config: DETRDistillConfig, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(config, student, teacher)
        refuse_many_to_one("DETRDistill", student, teacher)
        self.config: DETRDistillConfig = config
        self.supervision = supervision_of(student)
        self.pairs = layer_pairs(student.num_layers, teacher.num_layers)
        self.fields = shared_fields(student, teacher)
        if config.assignment_weight and not self.fields:
            raise ValueError(
                f"A {student.family} student ({student.width} wide) cannot decode the queries of a {teacher.family} "
                f"teacher ({teacher.width} wide): set assignment_weight to 0, or choose a teacher of the same family "
                "and width."
            )
        if config.feature_weight:
            self.projections = self._make_projections(student, teacher)

    def _make_projections(self, student: DetectorSpec, teacher: DetectorSpec) -> nn.ModuleList:
        level = self.config.feature_level
        wanted = teacher.features[level]
        if set(wanted) != {teacher.width}:
            raise ValueError(
                f"Feature masks compare the teacher's decoder states ({teacher.width} wide) with its {level} maps "
                f"({sorted(set(wanted))} wide): set feature_level to the other value, or feature_weight to 0."
            )
        return projections(student.features[level], wanted)

    @property
    def weights(self) -> dict[str, float]:
        logits, assignment, own = self.config.logits_weight, self.config.assignment_weight, self.supervision.weights
        return {
            "detrdistill_logits_class": logits,
            "detrdistill_logits_box": 5 * logits,
            "detrdistill_logits_giou": 2 * logits,
            "detrdistill_feature": self.config.feature_weight,
            **{f"detrdistill_assignment_{part}": weight * assignment for part, weight in own.items()},
        }

    @property
    def reads(self) -> TeacherParts:
        features = frozenset({self.config.feature_level}) if self.config.feature_weight else frozenset()
        fields = self.fields | {"rows"} if self.config.assignment_weight else frozenset()
        moves = not features and (not self.config.assignment_weight or bool(self.fields & {"boxes", "points"}))
        return TeacherParts(True, bool(features), fields, features, moves=moves)

    @property
    def questions(self) -> dict[str, Any]:
        return {}

    def query_requests(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, generator: torch.Generator
    ) -> QueryRequests:
        if not self.config.assignment_weight:
            return QueryRequests()
        return QueryRequests({"prior": teacher_queries(student, teacher, self.fields)})

    def costs(
        self, student: DetectorOutput, teacher: DetectorOutput, decoded: DecodedQueries, targets: Targets
    ) -> list[Tensor]:
        """Matching costs `(num_pairs, batch_size, num_queries, num_columns)`: with the ground truth, for the layers
        whose assignment supervises the teacher's queries in the student; and of student with teacher queries, in the
        paper's variant with and without the class cost."""
        asked = decoded.student.get("prior", ())
        by_student = self.config.variant == "released" and bool(asked)
        layers = [asked[s] for s, _, _ in self.pairs] if by_student else [teacher.layers[t] for _, t, _ in self.pairs]
        costs = [MATCHER.cost_of_layers(layers, targets)]
        if self.config.logits_weight:
            own, wanted = stacked_pairs(student.layers, teacher.layers, self.pairs)
            hidden = ~_shown(wanted)[:, :, None]  # take what the others leave
            costs.append(PAIRING.cost_between(own, wanted).masked_fill(hidden, 0.0))
            if self.config.variant == "paper":  # negatives are matched by boxes alone: their class is no-object
                costs.append(PAIRING.box_cost(own.boxes, wanted.boxes).masked_fill(hidden, 0.0))
        return costs

    def losses(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        decoded: DecodedQueries,
        targets: Targets,
        totals: BatchTotals,
        host_costs: list[np.ndarray],
    ) -> dict[LossKey, Tensor]:
        losses: dict[LossKey, Tensor] = {}
        to_objects, *between = host_costs
        solved = self._assignments(to_objects, between, targets.counts, teacher.layers[0].boxes.shape[1])
        index, pairing, positive = to_device(solved, targets.boxes.device)
        if self.config.logits_weight:
            losses |= self._logits(student, teacher, pairing, positive > 0, targets, totals)
        if self.config.feature_weight:
            losses |= self._features(student, teacher, targets, totals)
        if asked := decoded.student.get("prior", ()):
            losses |= self._assignment(asked, index, targets, totals)
        return losses

    # --- assignments -------------------------------------------------------------------------------------------------

    def _assignments(
        self, to_objects: np.ndarray, between: list[np.ndarray], counts: tuple[int, ...], num_teacher: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Solves every assignment of the step.

        Returns:
            `tuple` of `np.ndarray`, int64: the query matched to each box, for the assignment loss, `(num_pairs,
            batch_size, max_boxes)`; the student query of each teacher query, `(num_pairs, batch_size,
            teacher_queries)`, -1 for none; and 1 where that teacher query is a positive.
        """
        index = match_columns(to_objects, counts)
        pairing = np.full((len(self.pairs), len(counts), num_teacher), -1, dtype=np.int64)
        positive = np.ones_like(pairing, dtype=bool)
        if between and self.config.variant == "released":
            pairing = match_columns(between[0], [num_teacher] * len(counts))
        elif between:
            positive = positives(index, num_teacher)
            pairing = pair_positives_first(between[0], between[1], positive)
        return index, pairing, positive.astype(np.int64)

    # --- the three losses --------------------------------------------------------------------------------------------

    def _logits(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        pairing: Tensor,
        positive: Tensor,
        targets: Targets,
        totals: BatchTotals,
    ) -> dict[LossKey, Tensor]:
        own, wanted = stacked_pairs(student.layers, teacher.layers, self.pairs)
        terms = self._pair_terms(own, wanted, pairing, targets)
        paired = (pairing >= 0) & _shown(wanted)
        pairs = totals.images * min(student.layers[0].boxes.shape[1], pairing.shape[2])
        if self.config.variant == "released":
            groups: dict[str | None, tuple[Tensor, Any]] = {None: (paired, pairs)}
        else:
            groups = {
                "positive": (paired & positive, totals.or_one(totals.matched)),
                "negative": (paired & ~positive, totals.or_one(pairs - totals.matched)),
            }
        losses: dict[LossKey, Tensor] = {}
        for group, (chosen, divisor) in groups.items():
            for part, values in zip(PARTS, terms, strict=True):
                if (part, group) != ("class", "negative"):  # the class of a negative is always no-object
                    value = (values * chosen).sum((1, 2)) / divisor
                    losses |= per_layer(LossKey(self.name, f"logits_{part}", group), value, self.pairs)
        return losses

    def _pair_terms(self, student: Predictions, teacher: Predictions, index: Tensor, targets: Targets) -> Tensor:
        """Class, L1 and GIoU loss of every teacher query and its student query, `(3, num_pairs, batch_size,
        teacher_queries)`."""
        logits = gather_matched(among_known(student, teacher).logits, index)
        paired = Predictions(logits, gather_matched(student.boxes, index), None, student.activation)
        classes = soft_class_loss(logits, class_targets(teacher, student.activation), student.activation)
        terms = torch.stack([classes, *box_losses(paired.boxes, teacher.boxes)])
        return terms * better_answers(paired, teacher, targets) if self.config.gate == "better" else terms

    def _features(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, totals: BatchTotals
    ) -> dict[LossKey, Tensor]:
        """Masked squared distance of the maps, one loss per student level; the squared masks of all teacher layers are
        summed."""
        teacher_maps = teacher.features[self.config.feature_level]
        gamma = None if self.config.variant == "released" else self.config.gamma
        directions = query_directions(teacher.layers, targets, gamma)
        losses: dict[LossKey, Tensor] = {}
        for level, own in enumerate(student.features[self.config.feature_level]):
            wanted = nearest_level(own, teacher_maps)
            goal = wanted.values.float()
            projected = on_the_grid_of(wanted, own, self.projections[level])
            squares = feature_masks(directions, wanted).square().sum(0)  # (batch_size, height, width)
            if self.config.gate == "better":
                chosen = better_objects(student.layers[-1], teacher.layers[-1], targets)
                squares = squares * (cells_of(targets, wanted)[0] & chosen[..., None, None]).any(1)
            distance = (squares[:, None] * (goal - projected).square()).mean(1).sum((1, 2))
            losses[LossKey(self.name, "feature", layer=level)] = (distance / real_cells(wanted)).sum() / totals.images
        return losses

    def _assignment(
        self, asked: tuple[Predictions, ...], index: Tensor, targets: Targets, totals: BatchTotals
    ) -> dict[LossKey, Tensor]:
        answers = stacked([asked[s] for s, _, _ in self.pairs])

        def key(part: str) -> LossKey:
            return LossKey(self.name, f"assignment_{part}")

        return supervised_losses(key, answers, index, targets, totals, self.supervision, self.pairs)


def _shown(teacher: Predictions) -> Tensor:
    """The teacher's predictions that are there, bool `(num_pairs, batch_size, teacher_queries)`: all of a model; of
    detections, and of answers that move with the image, those with a score."""
    return teacher.scores().amax(-1) > 0
