"""A teacher's detections in place of labels that nobody has made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..structures.outputs import Activation, scores_of


def confident(logits: Tensor, activation: Activation, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The queries of one image that detect something with at least a score.

    Args:
        logits (`torch.Tensor` of shape `(num_queries, num_classes)`): with one more column for no-object if
            `activation` is softmax.
        activation: of the teacher's head.
        threshold (`float`)

    Returns:
        `tuple` of three `torch.Tensor` of shape `(num_detections,)`: the queries in order, the best class of each, and
        its score.
    """
    best, classes = scores_of(logits, activation).max(-1)
    queries = (best >= threshold).nonzero()[:, 0]
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
    """

    threshold: float
    classes: Sequence[int]
    activation: Activation
    last: str
    per_box: frozenset[str]
    hard: bool

    def __call__(self, columns: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """
        Args:
            columns (`dict[str, torch.Tensor]`): the answers, the queries along the first dimension.

        Returns:
            `tuple` of the labels (`class_labels` `(num_boxes,)`, `boxes` `(num_boxes, 4)`, `scores` `(num_boxes,)` and
            `labeled`), and of the answers, in which the entries per box are those of the labels.
        """
        queries, found, scores = confident(columns[f"{self.last}/logits"], self.activation, self.threshold)
        classes = torch.tensor(self.classes, dtype=torch.long)[found]
        shared = classes >= 0
        boxes = columns[f"{self.last}/boxes"].float()[queries[shared]]
        labels = {"class_labels": classes[shared], "boxes": boxes, "scores": scores[shared], "labeled": self.hard}
        return labels, {name: v[shared] if name in self.per_box else v for name, v in columns.items()}
