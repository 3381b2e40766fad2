"""Task-adaptive regularization: distils features, and classes and boxes of proposals where the teacher is better."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses.functional import among_known, box_overlap, class_targets, soft_class_loss
from ..structures.loss_key import LossKey
from ..structures.outputs import DetectorOutput, DetectorSpec, FeatureMap, ObjectQueries, Predictions, Proposals
from ..structures.targets import BatchTotals, Targets
from ..structures.teacher_parts import TeacherParts
from .base import DistillationMethod, Paper
from .decoding import DecodedQueries, QueryRequests
from .features import cells_of, nearest_level, on_the_grid_of, projections, real_length, standardized
from .queries import PlacesConfig, takes_place, with_content


DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # weights of torchvision's box coder
BETA = 1 / 9  # threshold of the smooth L1 loss in torchvision's box head


@dataclass(frozen=True)
class TaskAdaptiveConfig(PlacesConfig):
    """Options of task-adaptive regularization. The paper's equations were not available: see `PAPERS.md`."""

    feature_level: Literal["neck", "encoder"] = field(
        default="neck",
        metadata={
            "help": "Distilled feature maps: neck, the projected maps, or encoder, those that the decoder reads. "
            "Default: neck. [paper: FPN]"
        },
    )
    standardize_features: bool = field(
        default=True,
        metadata={
            "help": "Compare maps whose channels have mean 0 and variance 1 over each image. Their scale depends on "
            "the teacher, and as they are they can weigh a hundred times the detection loss. Default: true. [ours]"
        },
    )
    class_gate: Literal["better", "foreground"] = field(
        default="better",
        metadata={
            "help": "Foreground proposals whose classes are distilled. better: those for which the teacher's score of "
            "the true class is higher [ours]; foreground: all. Default: better."
        },
    )
    proposals: bool = field(
        default=True,
        metadata={
            "help": "Share the student's proposals with the teacher, for students with proposals. Default: true. "
            "[paper]"
        },
    )

    def __post_init__(self) -> None:
        if self.feature_level not in ("neck", "encoder"):
            raise ValueError(f"feature_level must be neck or encoder, got {self.feature_level!r}.")
        if self.class_gate not in ("better", "foreground"):
            raise ValueError(f"class_gate must be better or foreground, got {self.class_gate!r}.")


class TaskAdaptiveRegularization(DistillationMethod):
    """Adaptive distillation of features under a Gaussian mask of the objects, of the classes of student proposals for
    which the teacher's score of the true class is higher, and of boxes for which the teacher's box has a higher IoU
    with the object than the proposal.

    * features, for every level with mask `M` and `D` channels: `sum M |F_S - F_T|^2 / (2 D max(sum M, 1))`, of maps
      whose channels are standardised per image, since the scale of a teacher's maps is arbitrary
    * class, on the selected proposals: `KL(teacher || student)`, divided by their number
    * box, on the selected proposals: smooth L1 between the box deltas, divided by the number of all proposals

    Students without proposals (DETR families) get only the feature loss. The weight of all three decays to zero over
    the training, as in the paper: see `schedule`.

    The log has the share of foreground proposals that pass each gate. It excludes ground-truth boxes among the
    proposals, since no teacher box can be better than these.

    Requirements:
        For proposals, a teacher whose decoder accepts boxes.

    References:
        Sun et al., Distilling Object Detectors with Task Adaptive Regularization, 2020,
        https://arxiv.org/abs/2006.13108

    Relations:
        [`ComparingConfig`] offers the same gates for methods that compare predictions for queries.

    Example:
        ```python
        >>> method = TaskAdaptiveRegularization(TaskAdaptiveConfig(), student.spec, teacher.spec)
        >>> losses = method(student_output, teacher_output, targets, totals, torch.Generator())
        ```
    """

    name = "task_adaptive"
    paper = Paper(
        "Distilling Object Detectors with Task Adaptive Regularization",
        "2006.13108",
        "@article{sun2020taskadaptive, title={Distilling Object Detectors with Task Adaptive Regularization}, "
        "author={Sun, Ruoyu and Tang, Fuhui and Zhang, Xiaopeng and Xiong, Hongkai and Tian, Qi}, "
        "journal={arXiv preprint arXiv:2006.13108}, year={2020}}",
    )
    config_class = TaskAdaptiveConfig
    published = {"standardize_features": False}
    metrics = ("task_adaptive_class_pass", "task_adaptive_box_pass")
    gated = True
    schedule = "linear"

    def __init__(self, config: TaskAdaptiveConfig, student: DetectorSpec, teacher: DetectorSpec):
        super().__init__(config, student, teacher)
        self.config: TaskAdaptiveConfig = config
        self.teacher = teacher
        self.shares_proposals = config.proposals and not student.one_to_one
        if self.shares_proposals and not takes_place(teacher, "boxes"):
            raise ValueError(
                f"The proposals of a {student.family} student are boxes, which a {teacher.family} teacher cannot "
                "decode: choose another teacher, or set proposals to false to distil only the features."
            )
        level = config.feature_level
        self.projections = projections(student.features[level], teacher.features[level])

    @property
    def weights(self) -> dict[str, float]:
        parts = ("features", "class", "box") if self.shares_proposals else ("features",)
        return {f"task_adaptive_{part}": 1.0 for part in parts}

    @property
    def reads(self) -> TeacherParts:
        reason = "task-adaptive regularization asks the teacher at the student's own proposals"
        missing = reason if self.shares_proposals else None
        return TeacherParts(False, False, frozenset(), frozenset({self.config.feature_level}), missing=missing)

    @property
    def questions(self) -> dict[str, Any]:
        return {}

    def query_requests(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, generator: torch.Generator
    ) -> QueryRequests:
        if not self.shares_proposals or student.proposals is None or not student.proposals.boxes.shape[1]:
            return QueryRequests()
        queries = ObjectQueries(boxes=student.proposals.boxes, groups=(~student.proposals.valid).long())
        content = self.config.content_for(one_to_one=False)
        return QueryRequests(teacher={"proposals": with_content(queries, content, self.teacher.width)})

    def losses(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        decoded: DecodedQueries,
        targets: Targets,
        totals: BatchTotals,
        host_costs: list[np.ndarray],
    ) -> dict[LossKey, Tensor]:
        losses = self._features(student, teacher, targets.at_least_one_row(), totals)
        if self.shares_proposals and student.proposals is not None:
            asked = decoded.teacher.get("proposals")  # missing if no image has a proposal
            teacher_answers = student.layers[-1].detach() if asked is None else asked[-1]
            losses |= self._proposals(student.layers[-1], teacher_answers, student.proposals, totals)
        return losses

    def _features(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, totals: BatchTotals
    ) -> dict[LossKey, Tensor]:
        level, losses = self.config.feature_level, {}
        for number, own in enumerate(student.features[level]):
            goal = nearest_level(own, teacher.features[level])
            maps = [goal.values.float(), on_the_grid_of(goal, own, self.projections[number])]
            if self.config.standardize_features:
                maps = [standardized(values, goal.padding) for values in maps]
            apart = maps[0] - maps[1]
            mask = gaussian_mask(targets, goal)  # (batch_size, height, width)
            distance = (mask * apart.square().mean(1)).sum((1, 2)) / (2 * mask.sum((1, 2)).clamp(min=1))
            losses[LossKey(self.name, "features", layer=number)] = distance.sum() / totals.images
        return losses

    def _proposals(
        self, student: Predictions, teacher: Predictions, proposals: Proposals, totals: BatchTotals
    ) -> dict[LossKey, Tensor]:
        labels, foreground = proposals.labels.clamp(min=0), proposals.foreground
        own, wanted = student.boxes_of(labels), teacher.boxes_of(labels)
        known = among_known(student, teacher)
        with torch.no_grad():
            scores = [side.scores().gather(-1, labels[..., None])[..., 0] for side in (known, teacher)]
            better = scores[1] > scores[0]
            class_gate = foreground & better if self.config.class_gate == "better" else foreground
            overlaps = [box_overlap(boxes, proposals.matched)[0] for boxes in (proposals.boxes, wanted)]
            box_gate = foreground & (overlaps[1] > overlaps[0])
            if teacher.known is not None:
                class_gate, box_gate = (gate & teacher.known[labels] for gate in (class_gate, box_gate))
        classes = soft_class_loss(known.logits, class_targets(teacher, student.activation), student.activation)
        moves, goals = (box_deltas(boxes, proposals.boxes) for boxes in (own, wanted))
        moved = F.smooth_l1_loss(moves, goals, beta=BETA, reduction="none").sum(-1)
        counts = totals.mean_counts(torch.stack([class_gate.sum(), proposals.valid.sum()]).float())
        judged = foreground & ~proposals.added
        return {
            LossKey(self.name, "class", layer=0): (classes * class_gate).sum() / totals.or_one(counts[0]),
            LossKey(self.name, "box", layer=0): (moved * box_gate).sum() / totals.or_one(counts[1]),
            LossKey(self.name, "class_pass"): share(class_gate, judged),
            LossKey(self.name, "box_pass"): share(box_gate, judged),
        }


def gaussian_mask(targets: Targets, goal: FeatureMap) -> Tensor:
    """Gaussian on every object with half the box sides as standard deviation, zero outside of the cells that the box
    touches; the maximum where objects overlap.

    Returns:
        `torch.Tensor` of shape `(batch_size, height, width)` in [0, 1]; 0 outside of boxes and on padding.
    """
    inside, _ = cells_of(targets, goal)
    squares = []
    for axis, dimension in ((0, 1), (1, 0)):  # x along the width, y along the height
        length = real_length(goal, dimension)[:, None, None]
        cells = (torch.arange(goal.values.shape[2 + dimension], device=inside.device) + 0.5) / length
        center, half = targets.boxes[..., axis, None], targets.boxes[..., axis + 2, None].clamp(min=1e-6) / 2
        squares.append(((cells - center) / half).square())
    bells = torch.exp(-(squares[1][..., :, None] + squares[0][..., None, :]) / 2)
    return torch.where(inside, bells, 0.0).amax(1)


def box_deltas(boxes: Tensor, origin: Tensor) -> Tensor:
    """Box deltas `(..., 4)` from `origin` to `boxes`, in the units of torchvision's box coder."""
    boxes, origin = boxes.float(), origin.float()
    sides = origin[..., 2:].clamp(min=1e-6)
    shift = (boxes[..., :2] - origin[..., :2]) / sides
    scale = (boxes[..., 2:].clamp(min=1e-6) / sides).log()
    return torch.cat([shift, scale], -1) * boxes.new_tensor(DELTA_WEIGHTS)


def share(chosen: Tensor, judged: Tensor) -> Tensor:
    """Fraction of `judged` that is also `chosen`, a scalar; 0 if nothing is judged."""
    return (chosen & judged).sum() / judged.sum().clamp(min=1)
