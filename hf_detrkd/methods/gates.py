"""Where the teacher does better than the student, by the ground truth: the option `gate` of the comparing losses.

After task-adaptive regularization (Sun et al., https://arxiv.org/abs/2006.13108), which takes over a teacher's box
only where it overlaps the object more than the student's own. A query belongs to the object that the teacher's box
overlaps most, from an IoU of 0.5; queries that belong to none are not compared (ours).
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
    """Where a teacher's answer is better than the student's answer that it is compared with.

    Args:
        student, teacher ([`Predictions`]): answers that are compared row by row.
        targets ([`Targets`])

    Returns:
        `torch.Tensor` of shape `(3, batch_size, num_queries)`: 1 or 0 for class, L1 and GIoU. A class is better where
        the score of the object's class is higher; a box, where its IoU with the object is.
    """
    if targets.labels.shape[1] == 0:
        return torch.zeros(3, *teacher.boxes.shape[:2], device=teacher.boxes.device)
    student = among_known(student, teacher)
    own, theirs = (_overlap(side, targets) for side in (student, teacher))
    best, objects = theirs.max(-1)
    own = own.gather(-1, objects[..., None])[..., 0]
    labels = targets.labels.gather(1, objects)[..., None]
    scores = [side.scores().gather(-1, labels)[..., 0] for side in (student, teacher)]
    found = best >= MIN_IOU
    class_better, box_better = found & (scores[1] > scores[0]), found & (best > own)
    return torch.stack([class_better, box_better, box_better]).float()


@torch.no_grad()
def better_objects(student: Predictions, teacher: Predictions, targets: Targets) -> Tensor:
    """Objects that the teacher finds better: the highest product of score and IoU among all its own answers.

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
    """IoU of every query with every object, `(batch_size, num_queries, max_boxes)`; -1 for padding."""
    overlap = box_overlap(answers.boxes[:, :, None], targets.boxes[:, None])[0]
    return overlap.masked_fill(~targets.valid[:, None], -1.0)
