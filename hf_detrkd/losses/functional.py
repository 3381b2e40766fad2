"""Pure tensor functions: box overlap, classification losses, and losses between two detectors.

Everything is computed in float32. Functions return one value per row (a query or a matched pair) unless stated
otherwise, so that callers choose the weights and the divisor. Boxes are `(center_x, center_y, width, height)`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from ..structures.outputs import Predictions


def box_overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU of boxes that broadcast against each other.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): cxcywh.
        others (`torch.Tensor` of shape `(..., 4)`): cxcywh. Equal shapes give pairs; `boxes[..., :, None, :]` against
            `others[..., None, :, :]` gives the full matrix.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: IoU in [0, 1] and GIoU in [-1, 1]. Zero areas are clamped to the smallest
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
    """L1 distance summed over coordinates and `1 - GIoU` of paired boxes `(..., 4)`, both of shape `(...)`."""
    return box_distance(boxes, targets), 1 - box_overlap(boxes, targets)[1]


# --- between two detectors -------------------------------------------------------------------------------------------


def class_targets(teacher: Predictions, activation: str) -> Tensor:
    """Soft class targets: the teacher's probabilities in the format of the student's head.

    Args:
        teacher ([`Predictions`])
        activation (`"sigmoid"` or `"softmax"`): the student's.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_queries, num_classes)`, for softmax with a last column for no-object.
        If the teacher is a sigmoid head and the student a softmax head, no-object gets `1 - max_c p_c` and the row is
        normalised (ours).
    """
    scores = teacher.scores()
    if activation == "sigmoid":
        return scores
    if teacher.activation == "softmax":
        return teacher.logits.float().softmax(-1)
    scores = torch.cat([scores, 1 - scores.amax(-1, keepdim=True)], -1)
    return scores / scores.sum(-1, keepdim=True)


UNKNOWN = -1e4  # logit of an excluded class: zero probability, no gradient, and finite in 16 bits


def among_known(student: Predictions, teacher: Predictions) -> Predictions:
    """The student's predictions with the classes that the teacher does not know masked out, so that class losses
    compare only known classes: the masked columns have zero probability for both models."""
    if teacher.known is None:
        return student
    known = F.pad(teacher.known, (0, student.logits.shape[-1] - teacher.known.shape[-1]), value=True)
    return replace(student, logits=student.logits.masked_fill(~known, UNKNOWN))


def soft_class_loss(logits: Tensor, probabilities: Tensor, activation: str) -> Tensor:
    """Cross entropy of soft targets minus their entropy: the KL divergence, zero where the two agree.

    Args:
        logits (`torch.Tensor` of shape `(..., num_classes)`): the student's.
        probabilities (`torch.Tensor` of shape `(..., num_classes)`): see [`class_targets`].
        activation (`"sigmoid"` or `"softmax"`): binary cross entropy summed over classes, or cross entropy.

    Returns:
        `torch.Tensor` of shape `(...)`. Its gradient equals that of the cross entropy.
    """
    logits, entropy = logits.float(), torch.special.entr(probabilities)
    if activation == "sigmoid":
        # Term by term: `z - z * p` and a difference of two sums would give 1e-5 instead of 0 for 80 equal classes.
        cross = probabilities * F.softplus(-logits) + (1 - probabilities) * F.softplus(logits)
        entropy = entropy + torch.special.entr(1 - probabilities)
    else:
        cross = -probabilities * logits.log_softmax(-1)
    return (cross - entropy).sum(-1)


def softmax_kl(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`KL(softmax(z_T / T) || softmax(z_S / T))` summed over the last dimension; no factor of `T ** 2`.

    This is the forward KL divergence, with the teacher's distribution as the reference. For logits trained with a
    sigmoid it ignores a shift that is common to all classes.
    """
    student = (logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.float() / temperature).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


# --- against the ground truth ----------------------------------------------------------------------------------------


KINDS = ("cross_entropy", "focal", "varifocal", "matchability", "iou_aware")
"""Classification losses: softmax cross entropy with no-object (DETR), focal (Deformable DETR), VFL (RT-DETR), MAL
(DEIM), IA-BCE (LW-DETR)."""


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

    First every query gets the loss of a background query; matched queries then add the difference between foreground
    and background loss at their class. This needs one pass over the logits and no one-hot tensor.

    Args:
        logits (`torch.Tensor` of shape `(num_layers, batch_size, num_queries, num_classes)`)
        index (`torch.LongTensor` of shape `(num_layers, batch_size, max_boxes)`): query matched to each box; -1 for
            unmatched boxes.
        labels (`torch.LongTensor` of shape `(batch_size, max_boxes)`)
        kind (`str`): one of [`KINDS`]. `"cross_entropy"` has no-object as the last class and weights it with
            `no_object_weight`. The others are sums over classes of `-t log p - (1 - t) w log(1 - p)`, where `t` and
            `w` depend on the IoU `q` of the matched box: see [`_background`] and [`_foreground`].
        ious (`torch.Tensor` of shape `(num_layers, batch_size, max_boxes)`): `q` of each box and its query, detached.
        alpha, gamma (`float`): parameters of the focal-type losses; `alpha` of 1 disables the weight.

    Returns:
        `torch.Tensor` of shape `(num_layers,)`: sums over images, queries and classes.

    References:
        Lin et al., Focal Loss, https://arxiv.org/abs/1708.02002; Zhang et al., VarifocalNet,
        https://arxiv.org/abs/2008.13367; Huang et al., DEIM (MAL), https://arxiv.org/abs/2412.04234; Cai et al.,
        Align-DETR (IA-BCE), https://arxiv.org/abs/2304.07527
    """
    logits, matched = logits.float(), index >= 0
    cells = index.clamp(min=0) * logits.shape[-1] + labels  # index into logits flattened over queries and classes
    if kind == "cross_entropy":
        log_probabilities = logits.log_softmax(-1)
        no_object = -no_object_weight * log_probabilities[..., -1]  # (num_layers, batch_size, num_queries)
        correct = -log_probabilities.flatten(-2).gather(-1, cells)
        change = correct - no_object.gather(-1, index.clamp(min=0))
        return no_object.sum((1, 2)) + (change * matched).sum((1, 2))
    picked = logits.flatten(-2).gather(-1, cells)  # (num_layers, batch_size, max_boxes)
    change = _foreground(picked, ious, kind, alpha, gamma) - _background(picked, kind, alpha, gamma)
    return _background(logits, kind, alpha, gamma).sum((1, 2, 3)) + (change * matched).sum((1, 2))


def _background(logits: Tensor, kind: str, alpha: float, gamma: float) -> Tensor:
    """Loss of a background class: `w p^gamma * -log(1 - p)`. VFL and MAL detach the factor `p^gamma`."""
    scores = logits.detach() if kind in ("varifocal", "matchability") else logits
    weight = {"focal": 1 - alpha, "iou_aware": 1.0}.get(kind, alpha)
    return weight * scores.sigmoid().pow(gamma) * F.softplus(logits)


def _foreground(logits: Tensor, ious: Tensor, kind: str, alpha: float, gamma: float) -> Tensor:
    """Loss at the class of a matched box, where `ious` is the IoU `q` of query and box."""
    if kind == "focal":
        return alpha * (-logits).sigmoid().pow(gamma) * F.softplus(-logits)
    if kind == "varifocal":
        return ious * F.binary_cross_entropy_with_logits(logits, ious, reduction="none")
    if kind == "matchability":
        return F.binary_cross_entropy_with_logits(logits, ious.pow(gamma), reduction="none")
    # IA-BCE: target p^alpha q^(1 - alpha)
    quality = (logits.detach().sigmoid().pow(alpha) * ious.pow(1 - alpha)).clamp(min=0.01)
    return F.binary_cross_entropy_with_logits(logits, quality, reduction="none")


def gather_matched(values: Tensor, index: Tensor) -> Tensor:
    """Rows of `values` `(..., num_queries, channels)` at `index` `(..., max_boxes)`; an index of -1 reads row 0."""
    return values.gather(-2, index.clamp(min=0)[..., None].expand(*index.shape, values.shape[-1]))


def scatter_matched(index: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """`rows` `(..., num_queries)` with the values `(..., max_boxes)` written at `index`; an index of -1 is ignored."""
    slots = index.masked_fill(index < 0, rows.shape[-1])  # -1 goes to an extra slot that is cut off again
    return F.pad(rows, (0, 1)).scatter(-1, slots, values.to(rows.dtype))[..., :-1]


def matched_box_losses(boxes: Tensor, index: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Box losses of matched queries.

    Args:
        boxes (`torch.Tensor` of shape `(num_layers, batch_size, num_queries, 4)`)
        index (`torch.LongTensor` of shape `(num_layers, batch_size, max_boxes)`): query matched to each box, or -1.
        targets (`torch.Tensor` of shape `(batch_size, max_boxes, 4)`)

    Returns:
        `tuple` of `torch.Tensor`: sums of L1 and of `1 - GIoU`, both `(num_layers,)`, and the detached IoU of each box
        and its query, `(num_layers, batch_size, max_boxes)`.
    """
    matched = index >= 0
    own = gather_matched(boxes.float(), index)  # (num_layers, batch_size, max_boxes, 4)
    iou, giou = box_overlap(own, targets.expand_as(own))
    distance = box_distance(own, targets.expand_as(own))
    return (distance * matched).sum((1, 2)), ((1 - giou) * matched).sum((1, 2)), iou.detach()


def detection_losses(
    logits: Tensor, boxes: Tensor, index: Tensor, labels: Tensor, targets: Tensor, kind: str, **class_options: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the class, L1 and GIoU losses of several decoder layers at once.

    Args:
        logits, index, labels, kind, class_options: see [`hard_class_loss`].
        boxes, targets: see [`matched_box_losses`].

    Returns:
        `tuple` of three `torch.Tensor` of shape `(num_layers,)`: class, L1, `1 - GIoU`, not normalised.
    """
    distance, giou, iou = matched_box_losses(boxes, index, targets)
    return hard_class_loss(logits, index, labels, kind, iou, **class_options), distance, giou
