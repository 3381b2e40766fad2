"""Distillation points for a student that answers for every box that overlaps an object: where it looks, and where the
teacher sees something."""

from __future__ import annotations

import torch

from ..losses.functional import box_overlap, gather_matched
from ..structures.outputs import WHOLE_IMAGE, DetectorOutput, ObjectQueries, Predictions
from .query_losses import shares


MOST = 100  # boxes of the teacher
NEAR = 0.5  # IoU of a proposal that lies at a box of the teacher
SURE = 0.3  # score of the teacher's boxes that count for it


def best_boxes(teacher: Predictions) -> ObjectQueries:
    """The teacher's boxes with the highest scores, without gradient."""
    scores = teacher.scores().amax(-1)
    rows = scores.topk(min(MOST, scores.shape[1]), dim=1).indices
    return ObjectQueries(boxes=gather_matched(teacher.boxes.detach(), rows))


def nearby_proposals(
    student: DetectorOutput, teacher: Predictions, count: int, generator: torch.Generator
) -> ObjectQueries:
    """Proposals of the student, drawn with replacement: half of them among those at a box of the teacher, half among
    the rest; all from one kind where the other is missing, the whole image where both are.

    Args:
        student ([`DetectorOutput`]): with `proposals`.
        teacher ([`Predictions`])
        count (`int`): points an image.
        generator (`torch.Generator`): on the CPU.
    """
    assert student.proposals is not None
    boxes, valid = student.proposals.boxes, student.proposals.valid
    if not boxes.shape[1]:
        return ObjectQueries(boxes=boxes.new_tensor(WHOLE_IMAGE).expand(len(boxes), count, -1))
    overlap, _ = box_overlap(boxes[:, :, None], teacher.boxes.detach()[:, None])
    sure = teacher.scores().amax(-1) >= SURE
    near = valid & (overlap.masked_fill(~sure[:, None], 0.0).amax(-1) >= NEAR)
    weights = shares(near.float()) + shares((valid & ~near).float())
    ends = weights.cumsum(-1)
    places = torch.rand(len(boxes), count, generator=generator).to(boxes.device, non_blocking=True) * ends[:, -1:]
    rows = torch.searchsorted(ends, places, right=True).clamp(max=boxes.shape[1] - 1)
    return ObjectQueries(boxes=gather_matched(boxes, rows))
