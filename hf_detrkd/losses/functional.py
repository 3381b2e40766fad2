"""Pure tensor functions: box overlap, classification losses, and what is compared between two detectors.

Everything is computed in float32. Functions return one value per row (a query, a matched pair) unless they say
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


UNKNOWN = -1e4  # logit of a class that is left out: no probability, no gradient, and finite in 16 bits


def among_known(student: Predictions, teacher: Predictions) -> Predictions:
    """The student's predictions without the classes that the teacher does not know, so that class terms compare the
    rest alone: the left-out columns have no probability on either side."""
    if teacher.known is None:
        return student
    known = F.pad(teacher.known, (0, student.logits.shape[-1] - len(teacher.known)), value=True)
    return replace(student, logits=student.logits.masked_fill(~known, UNKNOWN))


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


KINDS = ("cross_entropy", "focal", "varifocal", "matchability", "iou_aware")
"""Classification losses: softmax with no-object (DETR), focal (Deformable DETR), VFL (RT-DETR), MAL (DEIM), IA-BCE
(LW-DETR)."""


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

    Every query is charged as if it had no object, and a matched one is then charged the difference at its class: one
    pass over the logits and no one-hot tensor.

    Args:
        logits (`torch.Tensor` of shape `(num_layers, batch_size, num_queries, num_classes)`)
        index (`torch.LongTensor` of shape `(num_layers, batch_size, max_boxes)`): the query of each box; -1 where it
            has none.
        labels (`torch.LongTensor` of shape `(batch_size, max_boxes)`)
        kind (`str`): one of [`KINDS`]. `"cross_entropy"` takes no-object as the last class and weighs it with
            `no_object_weight`. The others are sums over classes of `-t log p - (1 - t) w log(1 - p)`, where `t` and
            `w` follow the IoU `q` of the matched box: see [`_background`] and [`_foreground`].
        ious (`torch.Tensor` of shape `(num_layers, batch_size, max_boxes)`): `q` of each box and its query, detached.
        alpha, gamma (`float`): `alpha` of 1 leaves the weight out.

    Returns:
        `torch.Tensor` of shape `(num_layers,)`: the sum over images, queries and classes.

    References:
        Lin et al., Focal Loss, https://arxiv.org/abs/1708.02002; Zhang et al., VarifocalNet,
        https://arxiv.org/abs/2008.13367; Huang et al., DEIM (MAL), https://arxiv.org/abs/2412.04234; Cai et al.,
        Align-DETR (IA-BCE), https://arxiv.org/abs/2304.07527
    """
    logits, matched = logits.float(), index >= 0
    cells = index.clamp(min=0) * logits.shape[-1] + labels
    if kind == "cross_entropy":
        log_probabilities = logits.log_softmax(-1)
        no_object = -no_object_weight * log_probabilities[..., -1]
        correct = -log_probabilities.flatten(-2).gather(-1, cells)
        change = correct - no_object.gather(-1, index.clamp(min=0))
        return no_object.sum((1, 2)) + (change * matched).sum((1, 2))
    picked = logits.flatten(-2).gather(-1, cells)
    change = _foreground(picked, ious, kind, alpha, gamma) - _background(picked, kind, alpha, gamma)
    return _background(logits, kind, alpha, gamma).sum((1, 2, 3)) + (change * matched).sum((1, 2))


def _background(logits: Tensor, kind: str, alpha: float, gamma: float) -> Tensor:
    """Loss of a class that is not there: `w p^gamma * -log(1 - p)`. VFL and MAL hold the factor constant."""
    scores = logits.detach() if kind in ("varifocal", "matchability") else logits
    weight = {"focal": 1 - alpha, "iou_aware": 1.0}.get(kind, alpha)
    return weight * scores.sigmoid().pow(gamma) * F.softplus(logits)


def _foreground(logits: Tensor, ious: Tensor, kind: str, alpha: float, gamma: float) -> Tensor:
    """Loss of the class of a matched box, whose IoU with it is `q`."""
    if kind == "focal":
        return alpha * (-logits).sigmoid().pow(gamma) * F.softplus(-logits)
    if kind == "varifocal":
        return ious * F.binary_cross_entropy_with_logits(logits, ious, reduction="none")
    if kind == "matchability":
        return F.binary_cross_entropy_with_logits(logits, ious.pow(gamma), reduction="none")
    quality = (logits.detach().sigmoid().pow(alpha) * ious.pow(1 - alpha)).clamp(min=0.01)
    return F.binary_cross_entropy_with_logits(logits, quality, reduction="none")


def gather_matched(values: Tensor, index: Tensor) -> Tensor:
    """Rows of `values` `(..., num_queries, channels)` at `index` `(..., max_boxes)`; an index of -1 reads row 0."""
    return values.gather(-2, index.clamp(min=0)[..., None].expand(*index.shape, values.shape[-1]))


def scatter_matched(index: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """`rows` `(..., num_queries)` with the values of matched boxes `(..., max_boxes)` in their places; an index of -1
    changes nothing."""
    slots = index.masked_fill(index < 0, rows.shape[-1])
    return F.pad(rows, (0, 1)).scatter(-1, slots, values.to(rows.dtype))[..., :-1]


def matched_box_losses(boxes: Tensor, index: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Box losses of matched queries.

    Args:
        boxes (`torch.Tensor` of shape `(num_layers, batch_size, num_queries, 4)`)
        index (`torch.LongTensor` of shape `(num_layers, batch_size, max_boxes)`): the query of each box, -1 for none.
        targets (`torch.Tensor` of shape `(batch_size, max_boxes, 4)`)

    Returns:
        `tuple` of `torch.Tensor`: sums of L1 and of `1 - GIoU`, `(num_layers,)`, and every box's detached IoU with its
        query, `(num_layers, batch_size, max_boxes)`.
    """
    matched = index >= 0
    own = gather_matched(boxes.float(), index)
    iou, giou = box_overlap(own, targets.expand_as(own))
    distance = box_distance(own, targets.expand_as(own))
    return (distance * matched).sum((1, 2)), ((1 - giou) * matched).sum((1, 2)), iou.detach()


def detection_losses(
    logits: Tensor, boxes: Tensor, index: Tensor, labels: Tensor, targets: Tensor, kind: str, **class_options: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The three detection losses of several decoder layers at once, as sums.

    Args:
        logits, index, labels, kind, class_options: see [`hard_class_loss`].
        boxes, targets: see [`matched_box_losses`].

    Returns:
        `tuple` of three `torch.Tensor` of shape `(num_layers,)`: class, L1, `1 - GIoU`. Divide them by counts.
    """
    distance, giou, iou = matched_box_losses(boxes, index, targets)
    return hard_class_loss(logits, index, labels, kind, iou, **class_options), distance, giou
