"""A student that looks at proposals: what the tests of its points share."""

from __future__ import annotations

from dataclasses import replace

from hf_detrkd.structures.outputs import DetectorSpec
from tests.methods.fakes import spec


PARTS = ("class", "box", "giou")
GROUPS = ("specific", "general")
OBJECT = [0.5, 0.5, 0.5, 0.5]
HALF, LESS = [0.5, 0.5, 0.25, 0.5], [0.5, 0.5, 0.2499, 0.5]  # IoU of 1/2, and below


def proposing(classes: int = 3) -> DetectorSpec:
    return replace(spec(6, 1, classes, "softmax", "boxes", family="proposing"), one_to_one=False)
