"""CLoCKDistill: distils encoder memory weighted by location, and predictions for queries from the ground truth."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..structures.loss_key import LossKey
from ..structures.outputs import DetectorOutput, DetectorSpec, FeatureMap, ObjectQueries, Predictions
from ..structures.targets import BatchTotals, Targets
from ..structures.teacher_parts import TeacherParts
from .base import DistillationMethod, Paper
from .decoding import DecodedQueries, QueryRequests
from .features import cells_of, nearest_level, on_the_grid_of, projections
from .gates import better_answers, better_objects
from .layer_mapping import layer_pairs, parts_per_layer, stacked_pairs
from .queries import shared_place, with_content
from .query_losses import PointsConfig, as_compared, point_losses, shares


@dataclass(frozen=True)
class CLoCKDistillConfig(PointsConfig):
    """Options of CLoCKDistill. Few of the paper's numbers are known: see PAPERS.md."""

    memory_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the memory loss; 0 disables it. Default: 1. [third-party code: 1]"},
    )
    target_queries_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the losses of queries from the ground truth; 0 disables them. Default: 1. "
            "[third-party code: 1]"
        },
    )
    foreground_alpha: float = field(
        default=1e-3,
        metadata={
            "help": "Weight of the memory loss inside boxes. Default: 1e-3. [ours: with 5e-5 of third-party code, "
            "said to be the paper's, the memory loss was less than a hundredth of the detection loss]"
        },
    )
    background_beta: float = field(
        default=3e-3,
        metadata={
            "help": "Weight of the memory loss outside boxes. Default: 3e-3. [ours; third-party code, said to be the "
            "paper's: 1e-7]"
        },
    )
    class_content: bool = field(
        default=False,
        metadata={
            "help": "Give each target query a content for its class, one fixed random vector per class that both "
            "models get; they must have the same width. Replaces content. Default: false. [authors' prototype: a "
            "class indicator; the vectors: ours]"
        },
    )
    layer_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weight of the target queries' losses in each layer of the student, first to last. Default: 1 "
            "each. [authors' prototype has such weights, with unknown values]"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.layer_weights or [0.0]) < 0:
            raise ValueError(f"layer_weights must be at least 0, got {self.layer_weights}.")
        weights = (self.memory_weight, self.target_queries_weight)
        if min(*weights, self.foreground_alpha, self.background_beta) < 0 or max(weights) == 0:
            raise ValueError(
                "CLoCKDistill's weights must be at least 0, and memory_weight or target_queries_weight above 0, got "
                f"{weights}, alpha {self.foreground_alpha} and beta {self.background_beta}."
            )


class CLoCKDistill(DistillationMethod):
    """Location-and-context-aware memory distillation and target-aware consistent logit distillation.

    * memory: squared distance `d^2`, summed over channels, of the maps that the decoder reads. The scale `S` of cells
      inside boxes (mask `M`) is one over the area of the smallest box that contains them, that of cells outside one
      over their number: `alpha * sum M S d^2 + beta * sum (1 - M) S d^2`, summed over levels.
    * target queries: one query per ground-truth box, the same for both decoders and not trained; predictions are
      compared layer by layer as in KD-DETR, with `1 * T^2 KL(teacher || student) + 5 * L1 + 2 * (1 - GIoU)`. Queries
      are weighted by the teacher's highest score, normalised to sum to 1 over an image.

    Requirements:
        For `target_queries_weight` above 0, two decoders that share boxes or reference points.

    References:
        Lan & Tian, CLoCKDistill: Consistent Location-and-Context-aware Knowledge Distillation for DETRs, WACV 2026,
        https://arxiv.org/abs/2502.10683

    Relations:
        [`KDDETR`] uses random queries and the teacher's own queries; here the queries are the ground-truth boxes.

    Example:
        ```python
        >>> method = CLoCKDistill(CLoCKDistillConfig(), student.spec, teacher.spec)
        >>> losses = method(student_output, teacher_output, targets, totals, torch.Generator())
        ```
    """

    name = "clockdistill"
    paper = Paper(
        "CLoCKDistill: Consistent Location-and-Context-aware Knowledge Distillation for DETRs",
        "2502.10683",
        "@inproceedings{lan2026clockdistill, title={CLoCKDistill: Consistent Location-and-Context-aware Knowledge "
        "Distillation for DETRs}, author={Lan, Qizhen and Tian, Qing}, booktitle={WACV}, year={2026}}",
    )
    config_class = CLoCKDistillConfig
    published = {"class_loss": "softmax_kl", "foreground_alpha": 5e-5, "background_beta": 1e-7}

    class_table: Tensor

    def __init__(self, config: CLoCKDistillConfig, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(config, student, teacher)
        self.config: CLoCKDistillConfig = config
        self.student, self.teacher = student, teacher
        self.place = shared_place(student, teacher)
        if config.target_queries_weight and self.place is None:
            raise ValueError(
                f"CLoCKDistill decodes queries at the ground-truth boxes, but a {teacher.family} teacher and a "
                f"{student.family} student share neither boxes nor reference points: set target_queries_weight to 0, "
                "or choose two families with boxes or reference points."
            )
        self._check_options()
        if config.class_content:
            generator = torch.Generator().manual_seed(0)
            table = torch.randn(student.num_classes, student.width, generator=generator)
            self.register_buffer("class_table", table, persistent=False)
        if config.memory_weight:
            self.projections = projections(student.features["encoder"], teacher.features["encoder"])

    def _check_options(self) -> None:
        """Refuses options that this pair of models does not have."""
        student, teacher, weights = self.student, self.teacher, self.config.layer_weights
        if weights is not None and len(weights) != student.num_layers:
            raise ValueError(f"layer_weights must have {student.num_layers} weights, one per layer, got {weights}.")
        if self.config.class_content and student.width != teacher.width:
            raise ValueError(
                f"class_content needs models of the same width, but the student is {student.width} and the teacher "
                f"{teacher.width} wide."
            )

    @property
    def memory_parts(self) -> tuple[str, ...]:
        """Parts of the memory loss. A gate disables the background, where teacher and student cannot be ranked."""
        return ("foreground",) if self.config.gate == "better" else ("foreground", "background")

    @property
    def weights(self) -> dict[str, float]:
        config = self.config
        scales = {"foreground": config.foreground_alpha, "background": config.background_beta}
        memory = {f"clockdistill_{part}": scales[part] * config.memory_weight for part in self.memory_parts}
        queries = {"class": 1.0, "box": 5.0, "giou": 2.0}
        return memory | {f"clockdistill_{part}": w * config.target_queries_weight for part, w in queries.items()}

    @property
    def reads(self) -> TeacherParts:
        features = frozenset({"encoder"}) if self.config.memory_weight else frozenset()
        asked = frozenset({f"{self.name}/targets"}) if self.config.target_queries_weight else frozenset()
        return TeacherParts(False, False, frozenset(), features, asked)

    @property
    def questions(self) -> dict[str, Any]:
        if not self.config.target_queries_weight:
            return {}
        own = self.config.asked_content(self.student.one_to_one)
        return {"targets": {"content": "class" if self.config.class_content else own}}

    def query_requests(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, generator: torch.Generator
    ) -> QueryRequests:
        if not self.config.target_queries_weight:
            return QueryRequests()
        queries = target_queries(targets)
        if self.config.class_content:
            labels = targets.at_least_one_row().labels
            queries = replace(queries, content=self.class_table[labels])
            return QueryRequests({"targets": queries}, {"targets": queries})
        content = self.config.content_for(self.student.one_to_one)
        asked = (with_content(queries, content, spec.width) for spec in (self.student, self.teacher))
        return QueryRequests(*({"targets": one} for one in asked))

    def losses(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        decoded: DecodedQueries,
        targets: Targets,
        totals: BatchTotals,
        host_costs: list[np.ndarray],
    ) -> dict[LossKey, Tensor]:
        targets = targets.at_least_one_row()
        losses: dict[LossKey, Tensor] = {}
        if self.config.memory_weight:
            losses |= self._memory(student, teacher, targets, totals)
        if self.config.target_queries_weight:
            answers = decoded.student["targets"], decoded.teacher["targets"]
            losses |= self._target_queries(*answers, targets, totals)
        return losses

    def _memory(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, totals: BatchTotals
    ) -> dict[LossKey, Tensor]:
        """Scaled squared distances inside and outside of boxes, one loss per student level."""
        counted = targets.valid
        if self.config.gate == "better":
            counted = better_objects(student.layers[-1], teacher.layers[-1], targets)
        losses: dict[LossKey, Tensor] = {}
        for level, own in enumerate(student.features["encoder"]):
            goal = nearest_level(own, teacher.features["encoder"])
            apart = goal.values.float() - on_the_grid_of(goal, own, self.projections[level])
            distance = apart.square().sum(1)  # (batch_size, height, width)
            foreground, background = location_scales(targets, counted, goal)
            scales = {"foreground": foreground, "background": background}
            for part in self.memory_parts:
                scale = scales[part]
                losses[LossKey(self.name, part, layer=level)] = (scale * distance).sum() / totals.images
        return losses

    def _target_queries(
        self,
        student: tuple[Predictions, ...],
        teacher: tuple[Predictions, ...],
        targets: Targets,
        totals: BatchTotals,
    ) -> dict[LossKey, Tensor]:
        pairs = layer_pairs(len(student), len(teacher))
        valid = targets.valid
        weight = shares(teacher[-1].scores().amax(-1) * valid)
        own, wanted = stacked_pairs(student, teacher, pairs)
        values = weight * point_losses(own, wanted, self.config, self.student.one_to_one)
        if self.config.gate == "better":
            values = values * better_answers(as_compared(own, wanted), wanted, targets)
        terms = torch.where(valid, values, 0.0).sum((-2, -1)) / totals.or_one(totals.occupied)  # (3, num_pairs)
        if self.config.layer_weights:
            pairs = [(s, t, share * self.config.layer_weights[s]) for s, t, share in pairs]
        return parts_per_layer(self.name, terms, pairs)


def target_queries(targets: Targets) -> ObjectQueries:
    """One query per ground-truth box; padded rows form a separate group, which real queries do not attend to."""
    targets = targets.at_least_one_row()
    return ObjectQueries(boxes=targets.boxes, groups=(~targets.valid).long())


def location_scales(targets: Targets, counted: Tensor, goal: FeatureMap) -> tuple[Tensor, Tensor]:
    """Foreground and background weight of each cell of a map.

    Args:
        targets ([`Targets`])
        counted (`torch.Tensor` of shape `(batch_size, max_boxes)`): bool, boxes whose cells count; cells of the others
            count as neither foreground nor background.
        goal ([`FeatureMap`])

    Returns:
        `tuple` of two `torch.Tensor` of shape `(batch_size, height, width)`: one over the area, in cells, of the
        smallest box that contains the cell, 0 outside of boxes; and one over the number of cells outside of boxes, 0
        inside. Padded cells are 0 in both.
    """
    inside, area = cells_of(targets, goal)
    smallest, box = torch.where(inside, area[..., None, None], torch.inf).min(1)  # both (batch_size, height, width)
    is_foreground = smallest.isfinite()
    foreground = torch.where(is_foreground & counted.gather(1, box.flatten(1)).view_as(box), 1 / smallest, 0.0)
    real = torch.ones_like(is_foreground) if goal.padding is None else ~goal.padding
    outside = real & ~is_foreground
    background = outside / outside.sum((1, 2), keepdim=True).clamp(min=1)
    return foreground * real, background
