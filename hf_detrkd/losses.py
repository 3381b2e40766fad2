"""Pure tensor functions: box overlap, classification losses, and what is compared between two detectors.

Everything is computed in float32. Functions return one value per row (a query, a matched pair) unless they say
otherwise, so that callers choose the weights and the divisor. Boxes are `(center_x, center_y, width, height)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, sigmoid_focal_loss

from .outputs import Predictions


def box_overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU of boxes that broadcast against each other.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): cxcywh.
        others (`torch.Tensor` of shape `(..., 4)`): cxcywh. Equal shapes give pairs; `boxes[..., :, None, :]` against
            `others[..., None, :, :]` gives the whole matrix.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: IoU in [0, 1] and GIoU in [-1, 1]. An area of zero counts as the smallest
        positive number, so that two degenerate boxes give 0 and not NaN.

    References:
        Rezatofighi et al., Generalized Intersection over Union, https://arxiv.org/abs/1902.09630
    """
    left, top, right, bottom = box_convert(boxes.float(), "cxcywh", "xyxy").unbind(-1)
    other_left, other_top, other_right, other_bottom = box_convert(others.float(), "cxcywh", "xyxy").unbind(-1)
    width = (torch.minimum(right, other_right) - torch.maximum(left, other_left)).clamp(min=0)
    height = (torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)).clamp(min=0)
    intersection = width * height
    area, other_area = (right - left) * (bottom - top), (other_right - other_left) * (other_bottom - other_top)
    tiny = torch.finfo(torch.float32).tiny
    union = (area + other_area - intersection).clamp(min=tiny)
    hull_width = torch.maximum(right, other_right) - torch.minimum(left, other_left)
    hull_height = torch.maximum(bottom, other_bottom) - torch.minimum(top, other_top)
    hull = (hull_width * hull_height).clamp(min=tiny)
    iou = intersection / union
    return iou, iou - (hull - union) / hull


def box_distance(boxes: Tensor, others: Tensor) -> Tensor:
    """L1 distance, summed over the coordinates, of boxes that broadcast against each other as in `box_overlap`."""
    pairs = zip(boxes.float().unbind(-1), others.float().unbind(-1), strict=True)
    return sum((a - b).abs() for a, b in pairs)  # type: ignore[return-value]


def box_losses(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """L1 summed over coordinates and `1 - GIoU`, both of shape `(...)`, of paired boxes `(..., 4)`."""
    return box_distance(boxes, targets), 1 - box_overlap(boxes, targets)[1]


# --- between two detectors -------------------------------------------------------------------------------------------


def class_targets(teacher: Predictions, activation: str) -> Tensor:
    """The teacher's class probabilities in the form of the student's head.

    Args:
        teacher ([`Predictions`])
        activation (`"sigmoid"` or `"softmax"`): the student's.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_queries, num_classes)`, with a no-object column behind for softmax.
        A sigmoid teacher of a softmax student has no column for no-object: `1 - max_c p_c` stands for it, and the row
        is normalised (ours).
    """
    scores = teacher.scores()
    if activation == "sigmoid":
        return scores
    if teacher.activation == "softmax":
        return teacher.logits.float().softmax(-1)
    scores = torch.cat([scores, 1 - scores.amax(-1, keepdim=True)], -1)
    return scores / scores.sum(-1, keepdim=True)


def soft_class_loss(logits: Tensor, probabilities: Tensor, activation: str) -> Tensor:
    """Cross entropy of soft targets minus their entropy: the KL divergence, zero where the two agree.

    Args:
        logits (`torch.Tensor` of shape `(..., num_classes)`): the student's.
        probabilities (`torch.Tensor` of shape `(..., num_classes)`): see [`class_targets`].
        activation (`"sigmoid"` or `"softmax"`): binary cross entropy summed over classes, or cross entropy.

    Returns:
        `torch.Tensor` of shape `(...)`. Its gradient is that of the cross entropy alone.
    """
    logits, entropy = logits.float(), torch.special.entr(probabilities)
    if activation == "sigmoid":
        # Term by term: `z - z * p` and a difference of two sums would leave 1e-5 where 80 classes agree.
        cross = probabilities * F.softplus(-logits) + (1 - probabilities) * F.softplus(logits)
        entropy = entropy + torch.special.entr(1 - probabilities)
    else:
        cross = -probabilities * logits.log_softmax(-1)
    return (cross - entropy).sum(-1)


def softmax_kl(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`KL(softmax(z_T / T) || softmax(z_S / T))` summed over the last dimension; no factor of `T ** 2`.

    The teacher's distribution is the first argument of the divergence: the student is drawn to cover it. Softmax over
    logits that were trained with a sigmoid does not see a shift common to all classes.
    """
    student = (logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.float() / temperature).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


# --- against the ground truth ----------------------------------------------------------------------------------------


def scatter_labels(index: Tensor, values: Tensor, num_queries: int, fill: float) -> Tensor:
    """Values of matched ground truth, laid out by query.

    Args:
        index (`torch.LongTensor` of shape `(..., max_boxes)`): the query of each box; -1 where it has none.
        values (`torch.Tensor` of shape `(..., max_boxes)`)
        num_queries (`int`)
        fill (`float`): value of queries without a box.

    Returns:
        `torch.Tensor` of shape `(..., num_queries)`.
    """
    slots = index.masked_fill(index < 0, num_queries)
    rows = values.new_full((*index.shape[:-1], num_queries + 1), fill)
    return rows.scatter(-1, slots, values.expand_as(index))[..., :num_queries]


def hard_class_loss(
    logits: Tensor,
    index: Tensor,
    labels: Tensor,
    kind: str,
    ious: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    no_object_weight: float = 0.1,
) -> Tensor:
    """Classification loss of every query, matched or not.

    Args:
        logits (`torch.Tensor` of shape `(num_layers, batch_size, num_queries, num_classes)`)
        index (`torch.LongTensor` of shape `(num_layers, batch_size, max_boxes)`): see [`scatter_labels`].
        labels (`torch.LongTensor` of shape `(batch_size, max_boxes)`)
        kind (`"cross_entropy"`, `"focal"` or `"varifocal"`): softmax with no-object as the last class, weighted with
            `no_object_weight`; sigmoid focal loss; focal loss with the IoU of the matched box as target.
        ious (`torch.Tensor` of shape `(num_layers, batch_size, max_boxes)`): of each box and its query, detached.

    Returns:
        `torch.Tensor` of shape `(num_layers,)`: the sum over images, queries and classes.

    References:
        Lin et al., Focal Loss, https://arxiv.org/abs/1708.02002; Zhang et al., VarifocalNet,
        https://arxiv.org/abs/2008.13367
    """
    logits, (num_queries, num_classes) = logits.float(), logits.shape[-2:]
    if kind == "cross_entropy":
        classes = scatter_labels(index, labels, num_queries, num_classes - 1)
        weight = logits.new_ones(num_classes)
        weight[-1] = no_object_weight
        return F.cross_entropy(logits.movedim(-1, 1), classes, weight, reduction="none").sum((1, 2))
    classes = scatter_labels(index, labels, num_queries, num_classes)
    onehot = F.one_hot(classes, num_classes + 1)[..., :-1].to(logits.dtype)
    if kind == "focal":
        return sigmoid_focal_loss(logits, onehot, alpha, gamma, reduction="none").sum((1, 2, 3))
    target = scatter_labels(index, ious, num_queries, 0.0)[..., None] * onehot
    weight = alpha * logits.detach().sigmoid().pow(gamma) * (1 - onehot) + target
    return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="none").sum((1, 2, 3))


def gather_matched(values: Tensor, index: Tensor) -> Tensor:
    """Rows of `values` `(..., num_queries, channels)` at `index` `(..., max_boxes)`; an index of -1 reads row 0."""
    return values.gather(-2, index.clamp(min=0)[..., None].expand(*index.shape, values.shape[-1]))


def detection_losses(
    logits: Tensor, boxes: Tensor, index: Tensor, labels: Tensor, targets: Tensor, kind: str, **class_options: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The three detection losses of several decoder layers at once, as sums.

    Args:
        logits (`torch.Tensor` of shape `(num_layers, batch_size, num_queries, num_classes)`)
        boxes (`torch.Tensor` of shape `(num_layers, batch_size, num_queries, 4)`)
        index (`torch.LongTensor` of shape `(num_layers, batch_size, max_boxes)`): the query of each ground-truth box.
        labels (`torch.LongTensor` of shape `(batch_size, max_boxes)`)
        targets (`torch.Tensor` of shape `(batch_size, max_boxes, 4)`)
        kind, class_options: see [`hard_class_loss`].

    Returns:
        `tuple` of three `torch.Tensor` of shape `(num_layers,)`: class, L1, `1 - GIoU`. Divide them by counts.
    """
    matched = index >= 0
    own = gather_matched(boxes.float(), index)
    iou, giou = box_overlap(own, targets.expand_as(own))
    distance = box_distance(own, targets.expand_as(own))
    classes = hard_class_loss(logits, index, labels, kind, iou.detach(), **class_options)
    return classes, (distance * matched).sum((1, 2)), ((1 - giou) * matched).sum((1, 2))
