"""Gates that restrict distillation to objects that the teacher predicts better than the student (option `gate`).

Following task-adaptive regularization (Sun et al., https://arxiv.org/abs/2006.13108), which distils a teacher box only
if its IoU with the object is higher than the student's. A query is assigned to the object with the highest IoU with
the teacher's box, at least 0.5; queries without an object are not compared (ours).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses.functional import among_known, box_overlap
from ..structures.outputs import Predictions
from ..structures.targets import Targets


MIN_IOU = 0.5


@torch.no_grad()
def better_answers(student: Predictions, teacher: Predictions, targets: Targets) -> Tensor:
    """Mask of queries whose teacher prediction is better than the student prediction.

    Args:
        student, teacher ([`Predictions`]): predictions that are compared query by query; of one layer, or [`stacked`].
        targets ([`Targets`])

    Returns:
        `torch.Tensor` of shape `(3, ..., batch_size, num_queries)`: 1 or 0 for class, L1 and GIoU. A class is better
        if the score of the object's class is higher, a box if its IoU with the object is higher.
    """
    if targets.labels.shape[1] == 0:
        return torch.zeros(3, *student.boxes.shape[:-1], device=teacher.boxes.device)
    student = among_known(student, teacher)
    own, theirs = (_overlap(side, targets) for side in (student, teacher))
    best, objects = theirs.max(-1)  # (..., batch_size, num_queries)
    own = own.gather(-1, objects.expand(own.shape[:-1])[..., None])[..., 0]
    labels = targets.labels.expand(*objects.shape[:-1], -1).gather(-1, objects)
    scores = [
        side.scores().gather(-1, labels.expand(side.boxes.shape[:-1])[..., None])[..., 0]
        for side in (student, teacher)
    ]
    found = best >= MIN_IOU
    class_better, box_better = found & (scores[1] > scores[0]), found & (best > own)
    return torch.stack([class_better, box_better, box_better]).float()


@torch.no_grad()
def better_objects(student: Predictions, teacher: Predictions, targets: Targets) -> Tensor:
    """Mask of objects that the teacher detects better, by the highest product of score and IoU over its predictions.

    Returns:
        `torch.Tensor` of shape `(batch_size, max_boxes)`, bool.
    """
    best = []
    for side in (among_known(student, teacher), teacher):
        labels = targets.labels[:, None].expand(-1, side.boxes.shape[1], -1)
        quality = side.scores().gather(-1, labels) * _overlap(side, targets)
        best.append(quality.amax(1))
    return targets.valid & (best[1] > best[0])


def _overlap(answers: Predictions, targets: Targets) -> Tensor:
    """IoU of every query with every object, `(..., batch_size, num_queries, max_boxes)`; -1 for padding."""
    overlap = box_overlap(answers.boxes[..., :, None, :], targets.boxes[:, None])[0]
    return overlap.masked_fill(~targets.valid[:, None], -1.0)
