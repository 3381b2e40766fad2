"""Distillation points for proposal-based students: student proposals and the teacher's best boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses.functional import box_overlap, gather_matched
from ..structures.outputs import WHOLE_IMAGE, DetectorOutput, ObjectQueries, Predictions
from .query_losses import shares


MOST = 100  # number of teacher boxes
NEAR = 0.5  # minimum IoU of a proposal that is near a teacher box
SURE = 0.3  # minimum score of the teacher boxes that proposals are compared with


def best_boxes(teacher: Predictions) -> ObjectQueries:
    """The teacher's boxes with the highest scores, without gradient."""
    scores = teacher.scores().amax(-1)
    rows = scores.topk(min(MOST, scores.shape[1]), dim=1).indices
    return ObjectQueries(boxes=gather_matched(teacher.boxes.detach(), rows))


def assigned(teacher: tuple[Predictions, ...], places: ObjectQueries) -> tuple[tuple[Predictions, ...], Tensor]:
    """The teacher's own predictions at given boxes: of its last layer's boxes with a score of at least [`SURE`], the
    one that overlaps each place most.

    Returns:
        `tuple`: the predictions of every layer at the places, without gradient, and a bool `torch.Tensor` of shape
        `(batch_size, num_places)`, where this overlap is an IoU of at least [`NEAR`].
    """
    assert places.boxes is not None
    answers, boxes = teacher[-1], places.boxes
    overlap, _ = box_overlap(boxes[:, :, None], answers.boxes.detach()[:, None])
    sure = answers.scores().amax(-1) >= SURE
    best, row = overlap.masked_fill(~sure[:, None], -1.0).max(-1)
    return tuple(layer.at(row) for layer in teacher), best >= NEAR


def nearby_proposals(
    student: DetectorOutput, teacher: Predictions, count: int, generator: torch.Generator
) -> ObjectQueries:
    """Samples student proposals with replacement: half of them near a teacher box, half among the others; all from one
    kind if the other is missing, and the whole image if there are no proposals.

    Args:
        student ([`DetectorOutput`]): with `proposals`.
        teacher ([`Predictions`])
        count (`int`): points per image.
        generator (`torch.Generator`): on the CPU.
    """
    assert student.proposals is not None
    boxes, valid = student.proposals.boxes, student.proposals.valid
    if not boxes.shape[1]:
        return ObjectQueries(boxes=boxes.new_tensor(WHOLE_IMAGE).expand(len(boxes), count, -1))
    # (batch_size, num_proposals, num_teacher_queries)
    overlap, _ = box_overlap(boxes[:, :, None], teacher.boxes.detach()[:, None])
    sure = teacher.scores().amax(-1) >= SURE
    near = valid & (overlap.masked_fill(~sure[:, None], 0.0).amax(-1) >= NEAR)
    weights = shares(near.float()) + shares((valid & ~near).float())
    ends = weights.cumsum(-1)  # inverse transform sampling
    places = torch.rand(len(boxes), count, generator=generator).to(boxes.device, non_blocking=True) * ends[:, -1:]
    rows = torch.searchsorted(ends, places, right=True).clamp(max=boxes.shape[1] - 1)
    return ObjectQueries(boxes=gather_matched(boxes, rows))
