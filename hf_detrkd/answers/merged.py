"""The stored answers of several teachers to the same images, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from .reader import StoredAnswers


SAME_OBJECT = 0.7  # IoU of two teachers' detections of one class


class MergedAnswers:
    """Answers whose columns begin with the teacher's number: `0/layers/...`, `1/layers/...`.

    Args:
        members (`Sequence[StoredAnswers]`)

    Raises:
        ValueError: some answers move with the image, and others do not.
    """

    def __init__(self, members: Sequence[StoredAnswers]):
        forms = {member.moved for member in members}
        if len(forms) > 1:
            raise ValueError("Answers of several teachers must have the same --answers_form, views or moved.")
        self.members, (self.moved,) = list(members), forms

    def read(self, image_id: int, view: int) -> dict[str, Tensor]:
        return side_by_side([member.read(image_id, view) for member in self.members])

    def read_moved(self, image_id: int, placed: Tensor, least: float) -> dict[str, Tensor]:
        return side_by_side([member.read_moved(image_id, placed, least) for member in self.members])

    def as_labels(self, columns: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The detections of all teachers as labels; of two that detect the same object of a class, the better one."""
        pairs = [member.as_labels(part_of(columns, i)) for i, member in enumerate(self.members)]
        labels = [made for made, _ in pairs]
        boxes, classes, scores = (torch.cat([one[n] for one in labels]) for n in ("boxes", "class_labels", "scores"))
        kept = batched_nms(box_convert(boxes, "cxcywh", "xyxy"), scores, classes, SAME_OBJECT)
        found = {"boxes": boxes[kept], "class_labels": classes[kept], "scores": scores[kept]}
        return found | {"labeled": labels[0]["labeled"]}, side_by_side([answers for _, answers in pairs])


def side_by_side(answers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The columns of all teachers, each with the teacher's number."""
    return {f"{i}/{name}": values for i, columns in enumerate(answers) for name, values in columns.items()}


def part_of(columns: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The columns of one teacher."""
    start = f"{number}/"
    return {name.removeprefix(start): values for name, values in columns.items() if name.startswith(start)}
