"""Annotated boxes in another frame than the images, found by the teacher's boxes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_detrkd.cli.doctor import Seen, better_frame
from hf_detrkd.data import load_detection_split
from tests.cli.doctor.runs import IMAGES, SIDE, Box, answers, line, said, write_shapes


FRAMES: dict[str, tuple[Box, Any]] = {
    "corners": (lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]], "x_min, y_min, x_max, y_max"),
    "centres": (lambda b: [b[0] + b[2] / 2, b[1] + b[3] / 2, b[2], b[3]], "centre x, centre y"),
    "transposed": (lambda b: [b[1], b[0], b[3], b[2]], "y, x, height, width"),
    "relative": (lambda b: [v / SIDE for v in b], "divided by the image's"),
    "relative corners": (
        lambda b: [b[0] / SIDE, b[1] / SIDE, (b[0] + b[2]) / SIDE, (b[1] + b[3]) / SIDE],
        "x_min, y_min, x_max, y_max divided by",
    ),
    "half": (lambda b: [v / 2 for v in b], (0.5, 0.5)),
    "wide": (lambda b: [b[0] * 0.75, b[1] * 0.6, b[2] * 0.75, b[3] * 0.6], (0.75, 0.6)),
    "larger": (lambda b: [1.25 * v for v in b], (1.25, 1.25)),
}


@pytest.mark.parametrize("name", FRAMES)
def test_boxes_in_another_frame_are_recognised(name: str, tmp_path: Path, seen: list[Seen]) -> None:
    box, words = FRAMES[name]
    data = load_detection_split(write_shapes(tmp_path, box, splits=(("validation", IMAGES),)))
    read = [np.concatenate([r.boxes[:, :2], r.boxes[:, :2] + r.boxes[:, 2:]], 1) for r in data.records]
    named = [record.categories for record in data.records]  # boxes may have been dropped
    parts = zip(seen, read, named, strict=True)
    found = better_frame([replace(one, truth=boxes, labels=labels) for one, boxes, labels in parts])
    assert found is not None
    assert found[3] > found[2] + 0.25 and found[3] > 0.7
    if isinstance(words, tuple):
        scales = re.match(r"boxes of images ([\d.]+) times as wide and ([\d.]+) times as high", found[0])
        assert scales is not None and [float(s) for s in scales.groups()] == pytest.approx(words, abs=0.03)
    else:
        assert words in found[0]


def test_boxes_in_their_frame_are_left_alone(seen: list[Seen]) -> None:
    assert better_frame(seen) is None
    blind = [replace(one, boxes=one.boxes * 0.1) for one in seen]
    few = [replace(one, truth=one.truth[:0], labels=one.labels[:0]) for one in seen]
    assert better_frame(few) is None
    found = better_frame(blind)  # here it is the teacher's frame that is another
    assert found is not None and "times as wide" in found[0]


def test_corners_in_place_of_sizes_are_found_by_the_boxes_and_by_the_teacher(tmp_path: Path) -> None:
    report = answers(line(tmp_path, write_shapes(tmp_path / "data", FRAMES["corners"][0])))
    assert "extend beyond their image: they look like x_min" in said(report, "boxes", "problem")
    assert "read as x_min, y_min, x_max, y_max:" in said(report, "frame", "problem")
    said(report, "class order", "ok")  # looked at with the boxes in their place
    said(report, "preprocessing", "ok")
