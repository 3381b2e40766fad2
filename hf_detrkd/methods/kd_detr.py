"""KD-DETR: both decoders answer the same points, and the student copies the answers point by point."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..losses import box_losses, class_targets, soft_class_loss, softmax_kl
from ..matching import Assigning
from ..outputs import BatchTotals, DetectorOutput, DetectorSpec, ObjectQueries, Predictions, Targets
from .base import (
    DistillationMethod,
    Paper,
    layer_pairs,
    per_layer,
    shared_fields,
    takes_place,
    teacher_queries,
    zero_content,
)


@dataclass(frozen=True)
class KDDETRConfig:
    """Options of KD-DETR. Defaults are the paper's or the released code's where these are known."""

    general_points: int = field(
        default=300, metadata={"help": "Random points a step, one set for the whole batch; 0 for none. [paper: 300]"}
    )
    general_distribution: Literal["normal_logit", "uniform"] = field(
        default="normal_logit",
        metadata={"help": "Random boxes: N(0, 1) before the sigmoid [released code], or uniform with sides >= 0.01."},
    )
    specific_points: bool = field(
        default=True, metadata={"help": "Whether the teacher's own queries are points too. [paper]"}
    )
    content: Literal["zero", "own"] = field(
        default="zero",
        metadata={
            "help": "What the decoders start from at a box: zeros [released code], or the model's own encoder token "
            "at that place, which two-stage detectors are trained with [ours]."
        },
    )
    class_loss: Literal["softmax_kl", "bce"] = field(
        default="softmax_kl",
        metadata={
            "help": "KL of tempered softmax [released code], or of each head's own probabilities [ours], which a "
            "sigmoid and a softmax head together always get."
        },
    )
    temperature: float = field(default=10.0, metadata={"help": "Of softmax_kl. [released code: 10]"})
    scale: Literal["normalized", "released"] = field(
        default="normalized",
        metadata={
            "help": "Weights of an image's points sum to 1 [ours], or the released code's scale, whose class term "
            "grows with the batch and shrinks with the number of classes."
        },
    )
    foreground_weight: bool = field(
        default=True, metadata={"help": "Weigh points with the teacher's highest class score. [paper]"}
    )
    teacher_layers: Literal["last", "each"] = field(
        default="last",
        metadata={"help": "Teach every student layer by the teacher's last layer [released code], or by its own."},
    )

    def __post_init__(self) -> None:
        if self.general_points < 0 or self.temperature <= 0:
            raise ValueError(
                "general_points must be at least 0 and temperature above 0, got "
                f"{self.general_points} and {self.temperature}."
            )
        if not self.general_points and not self.specific_points:
            raise ValueError("KD-DETR needs points: set general_points above 0 or specific_points to true.")


class KDDETR(DistillationMethod):
    """Consistent distillation points.

    Two groups of queries go to both decoders, so that answers pair by index and no matching is needed: *general*
    points, drawn anew every step, and *specific* points, the teacher's own queries, for which the target is its
    ordinary answer. Queries get no gradient; student heads, decoder, encoder and backbone do.

    Per group, with the weight `w` of a point from the teacher's last layer (`w~` summing to 1 over an image):
    `2 * T^2 * sum w~ KL(teacher || student) + 5 * sum w~ |b_S - b_T|_1 + 2 * sum w~ (1 - GIoU)`, for every student
    layer.

    Requirements:
        A kind of place that both decoders take (boxes, or reference points), or one family and one width.

    References:
        Wang et al., KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points
        Sampling, CVPR 2024, https://arxiv.org/abs/2211.08071

    Relations:
        [`DETRDistill`] matches the two models' own answers instead, and so works where queries cannot be shared.

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
    groups = ("specific", "general")

    def __init__(self, config: KDDETRConfig, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(config, student, teacher)
        self.config: KDDETRConfig = config
        self.student, self.teacher = student, teacher
        self.fields = shared_fields(student, teacher)
        self.place = next(
            (p for p in ("boxes", "points") if takes_place(student, p) and takes_place(teacher, p)), None
        )
        pair = (
            f"a {teacher.family} teacher ({teacher.width} wide) and a {student.family} student ({student.width} wide)"
        )
        if not self.fields and self.place is None:
            raise ValueError(
                f"KD-DETR needs queries that both decoders understand, but {pair} share none: choose a pair of one "
                "family and width, two families with boxes or reference points, or --method detrdistill."
            )
        if config.specific_points and not self.fields:
            raise ValueError(
                f"The teacher's queries are reference points without size, which {pair} cannot share: set "
                "specific_points to false."
            )

    @property
    def weights(self) -> dict[str, float]:
        class_weight = 2.0 if self.config.scale == "normalized" else 1.0
        return {"kd_detr_class": class_weight, "kd_detr_box": 5.0, "kd_detr_giou": 2.0}

    def steps(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        targets: Targets,
        totals: BatchTotals,
        generator: torch.Generator,
    ) -> Assigning[dict[str, Tensor]]:
        yield []
        losses: dict[str, Tensor] = {}
        if self.config.specific_points:
            queries = teacher_queries(student, teacher, self._specific_fields())
            answers = student.decode(self._with_content(queries, self.student))
            losses |= self._compare("specific", answers, teacher.layers, totals)
        if self.config.general_points:
            queries = self._general_points(teacher, generator)
            answers = student.decode(self._with_content(queries, self.student))
            wanted = teacher.decode(self._with_content(queries, self.teacher))
            losses |= self._compare("general", answers, wanted, totals)
        return losses

    def _specific_fields(self) -> frozenset[str]:
        """Learned queries are shared whole; a proposal is its box, its content is chosen by the config."""
        return self.fields - {"content"} if "boxes" in self.fields else self.fields

    def _with_content(self, queries: ObjectQueries, spec: DetectorSpec) -> ObjectQueries:
        if self.config.content == "own" or queries.position is not None:
            return queries
        return zero_content(queries, spec.width)

    def _general_points(self, teacher: DetectorOutput, generator: torch.Generator) -> ObjectQueries:
        """One random set for the whole batch: places, or embeddings spread like the teacher's own [ours]."""
        count, example = self.config.general_points, teacher.layers[-1].boxes
        batch_size = example.shape[0]
        if self.place is None:
            position = teacher.queries.position
            assert position is not None
            noise = torch.randn(count, position.shape[-1], generator=generator).to(position.device, non_blocking=True)
            own = position[0].float()
            points = own.mean(0) + own.std(0) * noise
            return ObjectQueries(position=points.to(position.dtype).expand(batch_size, -1, -1))
        if self.config.general_distribution == "uniform":
            boxes = torch.rand(count, 4, generator=generator)
            boxes[:, 2:].clamp_(min=0.01)
        else:
            boxes = torch.randn(count, 4, generator=generator).sigmoid()
        boxes = boxes.to(example.device, non_blocking=True).expand(batch_size, -1, -1)
        return ObjectQueries(boxes=boxes)

    def _compare(
        self, group: str, student: tuple[Predictions, ...], teacher: tuple[Predictions, ...], totals: BatchTotals
    ) -> dict[str, Tensor]:
        """Compares answers to the same points, layer by layer; `w` has shape `(batch_size, num_points)`."""
        with torch.autocast(student[0].logits.device.type, enabled=False):
            best = teacher[-1].scores().amax(-1)
            weight = best if self.config.foreground_weight else torch.ones_like(best)
            pairs = self._pairs(len(student), len(teacher))
            terms = torch.stack([self._terms(student[s], teacher[t], weight, totals) for s, t, _ in pairs], dim=1)
        losses: dict[str, Tensor] = {}
        for part, values in zip(("class", "box", "giou"), terms.unbind(), strict=True):
            losses |= per_layer(f"kd_detr_{part}_{group}", values, pairs)
        return losses

    def _pairs(self, num_student: int, num_teacher: int) -> list[tuple[int, int, float]]:
        if self.config.teacher_layers == "each":
            return layer_pairs(num_student, num_teacher)
        return [(layer, num_teacher - 1, 1.0) for layer in range(num_student)]

    def _terms(self, student: Predictions, teacher: Predictions, weight: Tensor, totals: BatchTotals) -> Tensor:
        """Class, L1 and GIoU term of one layer, shape `(3,)`."""
        terms = torch.stack([self._class_loss(student, teacher), *box_losses(student.boxes, teacher.boxes)])
        if self.config.scale == "released":
            sums, total = (weight * terms).sum((1, 2)), weight.sum().clamp(min=1e-6)
            return torch.stack([sums[0] / student.num_classes, sums[1] / (4 * total), sums[2] / total])
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)
        return (weight * terms).sum((1, 2)) / totals.images

    def _class_loss(self, student: Predictions, teacher: Predictions) -> Tensor:
        if self.config.class_loss == "bce" or student.activation != teacher.activation:
            return soft_class_loss(student.logits, class_targets(teacher, student.activation), student.activation)
        temperature = self.config.temperature
        return temperature**2 * softmax_kl(student.logits, teacher.logits, temperature)
