"""Ground-truth detection losses for extra student queries."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..losses.functional import detection_losses
from ..losses.matching import HungarianMatcher
from ..structures.loss_key import LossKey
from ..structures.targets import BatchTotals, Targets
from .layer_mapping import PARTS, per_layer


MATCHER = HungarianMatcher(class_weight=2.0, box_weight=5.0, giou_weight=2.0)  # predictions with ground truth


def classification_of(activation: str) -> str:
    """Classification loss for a head's activation: see [`~hf_detrkd.losses.functional.hard_class_loss`]."""
    return "cross_entropy" if activation == "softmax" else "focal"


def supervised_losses(
    key: Callable[[str], LossKey],
    logits: Tensor,
    boxes: Tensor,
    index: Tensor,
    targets: Targets,
    totals: BatchTotals,
    activation: str,
    pairs: list[tuple[int, int, float]],
) -> dict[LossKey, Tensor]:
    """Detection losses of matched queries by part and student layer, divided by the number of boxes (cross entropy: by
    the sum of the weights of all queries).

    Args:
        key (`Callable[[str], LossKey]`): returns the key of a part.
        logits, boxes (`torch.Tensor` of shape `(num_pairs, batch_size, num_queries, ...)`)
        index (`torch.LongTensor` of shape `(num_pairs, batch_size, max_boxes)`): query matched to each box, or -1.
        targets ([`Targets`])
        totals ([`BatchTotals`])
        activation (`str`): activation of the student's head.
        pairs: see [`per_layer`].
    """
    kind, boxes_or_one = classification_of(activation), totals.boxes_or_one
    sums = detection_losses(logits, boxes, index, targets.labels, targets.boxes, kind)
    class_divisor = boxes_or_one if kind == "focal" else totals.class_weight(logits.shape[2], 0.1)
    losses: dict[LossKey, Tensor] = {}
    for part, value, by in zip(PARTS, sums, (class_divisor, boxes_or_one, boxes_or_one), strict=True):
        losses |= per_layer(key(part), value / by, pairs)
    return losses
