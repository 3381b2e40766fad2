"""A teacher's detections in place of labels that nobody has made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from ..structures.outputs import Activation, scores_of


DUPLICATE = 0.5  # IoU of two boxes of one class, as in Faster R-CNN's own post-processing


def confident(
    logits: Tensor, activation: Activation, threshold: float, boxes: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The queries of one image that detect something with at least a score.

    Args:
        logits (`torch.Tensor` of shape `(num_queries, num_classes)`): with one more column for no-object if
            `activation` is softmax.
        activation: of the teacher's head.
        threshold (`float`)
        boxes (`torch.Tensor` of shape `(num_queries, 4)`, *optional*): of a teacher that is not one-to-one, as
            (center_x, center_y, width, height): of several on an object, only the best is kept.

    Returns:
        `tuple` of three `torch.Tensor` of shape `(num_detections,)`: the queries in order, the best class of each, and
        its score.
    """
    best, classes = scores_of(logits, activation).max(-1)
    queries = (best >= threshold).nonzero()[:, 0]
    if boxes is not None:
        corners = box_convert(boxes[queries].float(), "cxcywh", "xyxy")
        kept = batched_nms(corners, best[queries].float(), classes[queries], DUPLICATE)
        queries = queries[kept.sort().values]
    return queries, classes[queries], best[queries]


@dataclass(frozen=True)
class PseudoLabels:
    """Makes the labels of an image from the stored answers to it.

    Args:
        threshold (`float`): lowest score of a detection.
        classes (`Sequence[int]`): the student's class for each of the teacher's, -1 for none.
        activation: of the teacher's head.
        last (`str`): start of the columns of the teacher's last layer.
        per_box (`frozenset[str]`): columns with one entry per box.
        hard (`bool`): the labels count as known, also for the detection loss.
        one_to_one (`bool`): false for a teacher whose queries repeat an object.
    """

    threshold: float
    classes: Sequence[int]
    activation: Activation
    last: str
    per_box: frozenset[str]
    hard: bool
    one_to_one: bool = True

    def __call__(self, columns: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """
        Args:
            columns (`dict[str, torch.Tensor]`): the answers, the queries along the first dimension.

        Returns:
            `tuple` of the labels (`class_labels` `(num_boxes,)`, `boxes` `(num_boxes, 4)`, `scores` `(num_boxes,)` and
            `labeled`), and of the answers, in which the entries per box are those of the labels.
        """
        places = columns[f"{self.last}/boxes"].float()
        repeated = None if self.one_to_one else places
        queries, found, scores = confident(columns[f"{self.last}/logits"], self.activation, self.threshold, repeated)
        classes = torch.tensor(self.classes, dtype=torch.long)[found]
        shared = classes >= 0
        labels = {
            "class_labels": classes[shared],
            "boxes": places[queries[shared]],
            "scores": scores[shared],
            "labeled": self.hard,
        }
        return labels, {name: v[shared] if name in self.per_box else v for name, v in columns.items()}
