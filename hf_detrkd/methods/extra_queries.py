"""The control of KD-DETR: as many more queries, supervised by the ground truth and by no teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..losses import detection_losses
from ..matching import Assigning, HungarianMatcher, match_columns, stack_layers, to_device
from ..outputs import BatchTotals, DetectorOutput, DetectorSpec, Targets
from ..questions import Questions, Replies
from .base import DistillationMethod, per_layer, random_queries, takes_place, with_content


MATCHER = HungarianMatcher(class_weight=2.0, box_weight=5.0, giou_weight=2.0)


@dataclass(frozen=True)
class ExtraQueriesConfig:
    """Options of the control."""

    extra_queries: int = field(
        default=600, metadata={"help": "Random queries a step; as many as the points of the compared run. [ours]"}
    )
    general_distribution: Literal["normal_logit", "uniform"] = field(
        default="normal_logit",
        metadata={"help": "Random boxes: N(0, 1) before the sigmoid [released code], or uniform with sides >= 0.01."},
    )
    content: Literal["zero", "own"] = field(
        default="zero",
        metadata={
            "help": "What the decoders start from at a box: zeros [released code], or the model's own encoder token "
            "at that place, which two-stage detectors are trained with [ours]."
        },
    )

    def __post_init__(self) -> None:
        if self.extra_queries < 1:
            raise ValueError(f"extra_queries must be at least 1, got {self.extra_queries}.")


class ExtraQueries(DistillationMethod):
    """Random queries in the student's decoder, matched with the ground truth in every layer (ours).

    The places are those of KD-DETR's general points. What a run gains by this it gains from more queries, not from a
    teacher's knowledge: a method has to beat it. Losses are those of detection: focal or cross entropy 2 or 1, L1 5,
    GIoU 2, by the number of boxes.

    Requirements:
        A student whose decoder can be asked other queries.
    """

    name = "extra_queries"
    paper = None
    config_class = ExtraQueriesConfig
    needs_teacher = False

    def __init__(self, config: ExtraQueriesConfig, student: DetectorSpec, teacher: DetectorSpec | None = None):
        super().__init__(config, student, teacher)  # type: ignore[arg-type]
        self.config: ExtraQueriesConfig = config
        self.student = student
        self.place = next((place for place in ("boxes", "points") if takes_place(student, place)), None)
        self.class_kind = "cross_entropy" if student.activation == "softmax" else "focal"
        if self.place is None and "position" not in student.query_fields:
            raise ValueError(
                f"extra_queries needs a decoder that can be asked other queries, and {student.family} has none: "
                "choose --method none."
            )

    @property
    def weights(self) -> dict[str, float]:
        class_weight = 1.0 if self.class_kind == "cross_entropy" else 2.0
        return {"extra_queries_class": class_weight, "extra_queries_box": 5.0, "extra_queries_giou": 2.0}

    def questions(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput | None,
        targets: Targets,
        generator: torch.Generator,
    ) -> Questions:
        count, distribution = self.config.extra_queries, self.config.general_distribution
        queries = random_queries(self.place, count, distribution, student, generator)
        return Questions({"extra": with_content(queries, self.config.content, self.student.width)})

    def steps(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput | None,
        replies: Replies,
        targets: Targets,
        totals: BatchTotals,
    ) -> Assigning[dict[str, Tensor]]:
        layers = replies.student["extra"]
        logits, boxes = stack_layers(layers)
        with torch.autocast(boxes.device.type, enabled=False):
            cost = MATCHER.cost(logits, boxes, targets, layers[0].activation)
        (host,) = yield [cost]
        (index,) = to_device([match_columns(host, targets.counts)], boxes.device)
        with torch.autocast(boxes.device.type, enabled=False):
            sums = detection_losses(logits, boxes, index, targets.labels, targets.boxes, self.class_kind)
        divisor = totals.boxes_or_one
        class_divisor = divisor if self.class_kind == "focal" else totals.class_weight(logits.shape[2], 0.1)
        pairs = [(layer, layer, 1.0) for layer in range(len(layers))]
        losses: dict[str, Tensor] = {}
        for part, value, by in zip(("class", "box", "giou"), sums, (class_divisor, divisor, divisor), strict=True):
            losses |= per_layer(f"extra_queries_{part}", value / by, pairs)
        return losses
