"""KD-DETR: both models decode the same queries, and the student learns the teacher's prediction for each query."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..structures.loss_key import LossKey
from ..structures.outputs import DetectorOutput, DetectorSpec, ObjectQueries, Predictions, stacked
from ..structures.targets import BatchTotals, Targets
from ..structures.teacher_parts import TeacherParts
from .base import DistillationMethod, Paper
from .decoding import DecodedQueries, QueryRequests
from .gates import better_answers
from .layer_mapping import layer_pairs, parts_per_layer, stacked_pairs
from .queries import RandomPlacesConfig, random_queries, shared_fields, shared_place, teacher_queries, with_content
from .query_losses import PointsConfig, as_compared, point_losses, shares
from .region_points import assigned, best_boxes, nearby_proposals


@dataclass(frozen=True)
class KDDETRConfig(PointsConfig, RandomPlacesConfig):
    """Options of KD-DETR. Defaults are those of the paper or the released code where these are known."""

    general_points: int = field(
        default=300,
        metadata={
            "help": "Number of random distillation points per step, one set for the whole batch; 0 disables them. "
            "Default: 300. [paper: 300]"
        },
    )
    specific_points: bool = field(
        default=True,
        metadata={"help": "Use the teacher's own queries as distillation points too. Default: true. [paper]"},
    )
    scale: Literal["normalized", "released"] = field(
        default="normalized",
        metadata={
            "help": "normalized: the weights of an image's points sum to 1 [ours]; released: the scale of the "
            "released code, whose class loss grows with the batch size and shrinks with the number of classes. "
            "Default: normalized."
        },
    )
    foreground_weight: bool = field(
        default=True,
        metadata={"help": "Weight points by the teacher's highest class score. Default: true. [paper]"},
    )
    teacher_layers: Literal["last", "each"] = field(
        default="last",
        metadata={
            "help": "last: the teacher's last layer supervises every student layer [released code]; each: every "
            "student layer has its corresponding teacher layer. Default: last."
        },
    )
    proposal_targets: Literal["assigned", "asked"] = field(
        default="asked",
        metadata={
            "help": "What a Faster R-CNN student learns at its boxes from a teacher with queries. assigned: the "
            "teacher's own prediction whose box overlaps them most, if its score is at least 0.3 and the IoU 0.5; "
            "asked: the teacher's predictions for these boxes as queries. Default: asked. [ours]"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.general_points < 0:
            raise ValueError(f"general_points must be at least 0, got {self.general_points}.")
        if not self.general_points and not self.specific_points:
            raise ValueError("KD-DETR needs points: set general_points above 0 or specific_points to true.")


class KDDETR(DistillationMethod):
    """Distillation with consistent distillation points (queries shared by both decoders).

    Both decoders get the same two groups of queries, so that predictions pair by index without matching: *general*
    points, sampled in every step, and *specific* points, the teacher's own queries, for which the target is its
    ordinary prediction (with `content="zero"`, that for the same boxes without content). Queries get no gradient;
    student heads, decoder, encoder and backbone do.

    Per group and student layer, with weights `w` of the points from the teacher's last layer (`w~`: normalised to sum
    to 1 over an image):
    `2 * T^2 * sum w~ KL(teacher || student) + 5 * sum w~ |b_S - b_T|_1 + 2 * sum w~ (1 - GIoU)`.

    Requirements:
        Two decoders that share boxes or reference points, or that have the same family and width.

    References:
        Wang et al., KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points
        Sampling, CVPR 2024, https://arxiv.org/abs/2211.08071

    Relations:
        [`DETRDistill`] matches the predictions for the models' own queries, so it needs no shared queries.

    Example:
        ```python
        >>> method = KDDETR(KDDETRConfig(general_points=100), student.spec, teacher.spec)
        >>> losses = method(student_output, teacher_output, targets, totals, torch.Generator().manual_seed(0))
        ```
    """

    name = "kd_detr"
    paper = Paper(
        "KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points Sampling",
        "2211.08071",
        "@inproceedings{wang2024kddetr, title={KD-DETR: Knowledge Distillation for Detection Transformer with "
        "Consistent Distillation Points Sampling}, author={Wang, Yu and Li, Xin and Weng, Shengzhao and Zhang, Gang "
        "and Yue, Haixiao and Feng, Haocheng and Han, Junyu and Ding, Errui}, booktitle={CVPR}, year={2024}}",
    )
    config_class = KDDETRConfig
    published = {"class_loss": "softmax_kl"}
    groups = ("specific", "general")

    def __init__(self, config: KDDETRConfig, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(config, student, teacher)
        self.config: KDDETRConfig = config
        self.student, self.teacher, self.content = student, teacher, config.content_for(student.one_to_one)
        self.fields = shared_fields(student, teacher)
        self.place = shared_place(student, teacher)
        pair = (
            f"a {teacher.family} teacher ({teacher.width} wide) and a {student.family} student ({student.width} wide)"
        )
        if not self.fields and self.place is None:
            raise ValueError(
                f"KD-DETR needs queries that both decoders understand, but {pair} share none: choose a pair of one "
                "family and width, two families with boxes or reference points, or --method detrdistill."
            )
        if config.content == "teacher" and not {"content", "boxes"} <= self.fields:
            raise ValueError(f"content teacher needs queries with content and boxes that fit both, but not {pair}.")
        if config.specific_points and student.one_to_one and not self.fields:
            raise ValueError(
                f"The teacher's queries are reference points without size, which {pair} cannot share: set "
                "specific_points to false."
            )

    @property
    def assigns(self) -> bool:
        """Whether the teacher's own predictions are assigned to the boxes of a proposal-based student."""
        return self.config.proposal_targets == "assigned" and self.teacher.one_to_one and not self.student.one_to_one

    @property
    def weights(self) -> dict[str, float]:
        class_weight = 2.0 if self.config.scale == "normalized" else 1.0
        return {"kd_detr_class": class_weight, "kd_detr_box": 5.0, "kd_detr_giou": 2.0}

    @property
    def reads(self) -> TeacherParts:
        config = self.config
        fields = self._specific_fields() | {"rows"} if config.specific_points else frozenset()
        if config.general_points and self.place is None:
            fields |= {"position"}  # random queries have their mean and spread
        asks = not self.student.one_to_one and not self.assigns
        missing = "KD-DETR asks the teacher at the student's own proposals" if asks else None
        moves = config.foreground_weight and not self.questions and self.place is not None
        last = config.teacher_layers == "last"
        merges = last and self.place is not None and "specific" not in self.questions
        return TeacherParts(not last, False, fields, moves=moves, merges=merges, missing=missing)

    @property
    def questions(self) -> dict[str, Any]:
        if not self.student.one_to_one:
            return {}
        config, content = self.config, self.config.asked_content(self.student.one_to_one)
        general = {"points": config.general_points, "distribution": config.general_distribution, "place": self.place}
        found: dict[str, Any] = {"general": general | {"content": content}} if config.general_points else {}
        return found | ({"specific": {"content": "zero"}} if config.specific_points and content == "zero" else {})

    def query_requests(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, generator: torch.Generator
    ) -> QueryRequests:
        if not self.student.one_to_one:
            return self._regions(student, teacher, generator)
        asked: dict[str, ObjectQueries] = {}
        answered: dict[str, ObjectQueries] = {}  # without its own queries: their predictions are already computed
        if self.config.specific_points:
            queries = teacher_queries(student, teacher, self._specific_fields())
            asked["specific"] = with_content(queries, self.content, self.student.width)
            if asked["specific"] is not queries:  # with other content than its own, the teacher predicts otherwise
                answered["specific"] = with_content(queries, self.content, self.teacher.width)
        if self.config.general_points:
            count, distribution = self.config.general_points, self.config.general_distribution
            queries = random_queries(self.place, count, distribution, teacher, generator)
            asked["general"] = with_content(queries, self.content, self.student.width)
            answered["general"] = with_content(queries, self.content, self.teacher.width)
        return QueryRequests(asked, answered)

    def _regions(self, student: DetectorOutput, teacher: DetectorOutput, generator: torch.Generator) -> QueryRequests:
        """Points for a proposal-based student: the teacher's best boxes, and the student's own proposals."""
        config, answers, places = self.config, teacher.layers[-1], {}
        if config.specific_points:
            places["specific"] = best_boxes(answers)
        if config.general_points:
            places["general"] = nearby_proposals(student, answers, config.general_points, generator)
        if self.assigns:
            return QueryRequests(places)
        width = self.teacher.width
        return QueryRequests(
            places, {name: with_content(place, self.content, width) for name, place in places.items()}
        )

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
        for group, answers in decoded.student.items():
            wanted, counted = decoded.teacher.get(group, teacher.layers), None
            if self.assigns:
                wanted, counted = assigned(teacher.layers, decoded.asked[group])
            losses |= self._compare(group, answers, wanted, targets, totals, counted)
        return losses

    def _specific_fields(self) -> frozenset[str]:
        """Fields of specific points: all shared fields, but for boxes the config chooses the content."""
        chosen = "boxes" in self.fields and self.content != "teacher"
        return self.fields - {"content"} if chosen else self.fields

    def _compare(
        self,
        group: str,
        student: tuple[Predictions, ...],
        teacher: tuple[Predictions, ...],
        targets: Targets,
        totals: BatchTotals,
        counted: Tensor | None,
    ) -> dict[LossKey, Tensor]:
        """Losses of one group of points by layer; `weight` and `counted`, the points that count, have shape
        `(batch_size, num_points)`."""
        best = teacher[-1].scores().amax(-1)
        weight = best if self.config.foreground_weight else torch.ones_like(best)
        weight = weight if counted is None else weight * counted
        if self.config.teacher_layers == "each":
            pairs = layer_pairs(len(student), len(teacher))
            own, wanted = stacked_pairs(student, teacher, pairs)
        else:
            pairs = [(layer, len(teacher) - 1, 1.0) for layer in range(len(student))]
            own, wanted = stacked(student), teacher[-1]
        return parts_per_layer(self.name, self._terms(own, wanted, weight, targets, totals), pairs, group)

    def _terms(
        self, student: Predictions, teacher: Predictions, weight: Tensor, targets: Targets, totals: BatchTotals
    ) -> Tensor:
        """Class, L1 and GIoU loss of each layer, `(3, num_layers)`."""
        terms = point_losses(student, teacher, self.config, self.student.one_to_one)
        if self.config.gate == "better":
            terms = terms * better_answers(as_compared(student, teacher), teacher, targets)
        if self.config.scale == "released":
            sums, total = (weight * terms).sum((-2, -1)), weight.sum().clamp(min=1e-6)
            return torch.stack([sums[0] / student.num_classes, sums[1] / (4 * total), sums[2] / total])
        return (shares(weight) * terms).sum((-2, -1)) / totals.images
