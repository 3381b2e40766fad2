"""Ground-truth detection losses for extra student queries."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..losses.functional import detection_losses
from ..losses.matching import HungarianMatcher
from ..structures.loss_key import LossKey
from ..structures.outputs import DetectorSpec, Predictions
from ..structures.supervision import Supervision
from ..structures.targets import BatchTotals, Targets
from .layer_mapping import PARTS, per_layer


MATCHER = HungarianMatcher(class_weight=2.0, box_weight=5.0, giou_weight=2.0)  # predictions with ground truth


def supervision_of(student: DetectorSpec) -> Supervision:
    """The loss of the student's own queries, which its extra queries get too."""
    assert student.supervision is not None, f"{student.family} has no set-prediction loss"
    return student.supervision


def supervised_losses(
    key: Callable[[str], LossKey],
    answers: Predictions,
    index: Tensor,
    targets: Targets,
    totals: BatchTotals,
    supervision: Supervision,
    pairs: list[tuple[int, int, float]],
) -> dict[LossKey, Tensor]:
    """Detection losses of matched queries by part and student layer, divided by the number of boxes (cross entropy: by
    the sum of the weights of all queries).

    Args:
        key (`Callable[[str], LossKey]`): returns the key of a part.
        answers ([`Predictions`]): [`stacked`] ones, `(num_pairs, batch_size, num_queries, ...)`.
        index (`torch.LongTensor` of shape `(num_pairs, batch_size, max_boxes)`): query matched to each box, or -1.
        targets ([`Targets`])
        totals ([`BatchTotals`])
        supervision ([`Supervision`]): see [`supervision_of`].
        pairs: see [`per_layer`].
    """
    kind, class_divisor = supervision.classification, totals.boxes_or_one
    sums = detection_losses(
        answers.logits, answers.boxes, index, targets.labels, targets.boxes, kind, **supervision.class_options
    )
    if kind == "cross_entropy":
        class_divisor = totals.class_weight(answers.boxes.shape[2], supervision.no_object_weight)
    losses: dict[LossKey, Tensor] = {}
    for part, value, by in zip(PARTS, sums, (class_divisor, totals.boxes_or_one, totals.boxes_or_one), strict=True):
        losses |= per_layer(key(part), value / by, pairs)
    return losses
