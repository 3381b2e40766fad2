"""The gate of the comparing losses: where a teacher does better."""

from __future__ import annotations

import pytest
import torch

from hf_detrkd.methods.gates import better_answers, better_objects
from hf_detrkd.structures.outputs import Predictions
from hf_detrkd.structures.targets import Targets
from tests import tiny
from tests.methods import naive
from tests.methods.fakes import HEADS, by_image, targets_of, truth_of
from tests.methods.gates import OBJECT, answers, objects


EXACT, NARROW, LEFT, RIGHT = OBJECT, [0.5, 0.5, 0.375, 0.5], [0.4375, 0.5, 0.5, 0.5], [0.5625, 0.5, 0.5, 0.5]
HALF, LESS = [0.5, 0.5, 0.25, 0.5], [0.5, 0.5, 0.24, 0.5]  # IoU of 1/2, and below


@pytest.mark.parametrize(
    ("theirs", "own", "better"),
    [
        ((EXACT, [0, 2]), (NARROW, [0, 1]), [1, 1, 1]),
        ((NARROW, [0, 1]), (EXACT, [0, 2]), [0, 0, 0]),
        ((EXACT, [0, 1]), (NARROW, [0, 2]), [0, 1, 1]),
        ((NARROW, [0, 2]), (EXACT, [0, 1]), [1, 0, 0]),
        ((NARROW, [5, 2]), (NARROW, [-5, 2]), [0, 0, 0]),
        ((LEFT, [0, 2]), (RIGHT, [0, 2]), [0, 0, 0]),
        ((HALF, [0, 2]), ([0.1, 0.1, 0.1, 0.1], [0, 1]), [1, 1, 1]),
        ((LESS, [0, 2]), ([0.1, 0.1, 0.1, 0.1], [0, 1]), [0, 0, 0]),
        ((EXACT, [9, -1]), (NARROW, [-9, 0]), [0, 1, 1]),
    ],
    ids=[
        "in both",
        "in neither",
        "in the box",
        "in the class",
        "a tie of equals",
        "a tie of mirrored boxes",
        "half an object",
        "less than half",
        "in another class",
    ],
)
def test_an_answer_is_better_by_its_object_s_score_and_by_its_iou(theirs, own, better):
    targets = objects(OBJECT, labels=[1])
    sides = [answers([box], [logits]) for box, logits in (own, theirs)]
    assert better_answers(*sides, targets)[:, 0, 0].tolist() == better


def test_an_answer_belongs_to_the_object_that_the_teacher_overlaps_most():
    targets = objects(OBJECT, NARROW, labels=[0, 1])
    own, theirs = answers([EXACT], [[-3.0, 3.0]]), answers([NARROW], [[3.0, -3.0]])
    # The student's box is exact for the first object and the teacher's for the second, whose class the student knows.
    assert better_answers(own, theirs, targets)[:, 0, 0].tolist() == [0, 1, 1]


def near(targets: Targets, num_queries: int, classes: int, activation: str, spread: float) -> Predictions:
    """Random answers around the objects; of an image without any, around its middle."""
    rows = [
        label["boxes"][torch.arange(num_queries) % len(label["boxes"])]
        if len(label["boxes"])
        else torch.tensor(OBJECT).expand(num_queries, 4)
        for label in targets.to_labels()
    ]
    boxes = torch.stack(rows) * (1 + spread * torch.randn(len(rows), num_queries, 4)).clamp(0.5, 1.5)
    logits = torch.randn(len(rows), num_queries, classes + (activation == "softmax"))
    return Predictions(logits, boxes, torch.zeros(len(rows), num_queries, 2), activation)


@pytest.mark.parametrize("counts", [(1, 3, 0), (2,), (0, 0), (5, 1)], ids=str)
@pytest.mark.parametrize("student_head", HEADS)
@pytest.mark.parametrize("teacher_head", HEADS)
def test_the_gate_equals_the_naive_computation(counts, student_head, teacher_head):
    seen: set[float] = set()
    for _ in range(5):
        targets = targets_of(*counts)
        own, theirs = (near(targets, 9, 3, head, 0.1) for head in (student_head, teacher_head))
        sides = by_image([own])[0], by_image([theirs])[0]
        found = better_answers(own, theirs, targets)
        assert torch.equal(found, naive.better_answers(*sides, truth_of(targets)))
        seen |= set(found.flatten().tolist())
        of_objects = better_objects(own, theirs, targets)
        assert of_objects.shape == targets.valid.shape and not of_objects[~targets.valid].any()
        expected = naive.better_objects(*sides, truth_of(targets))
        assert [row[:count].tolist() for row, count in zip(of_objects, counts, strict=True)] == expected
    assert seen == ({0.0, 1.0} if sum(counts) else {0.0})


def test_a_box_that_stands_in_padding_is_no_object():
    targets = targets_of(1, 3)
    padding = targets.boxes[0, 1:]
    own, theirs = (
        Predictions(torch.randn(2, 2, 3), tiny.random_boxes(2, 2), torch.zeros(2, 2, 2), "sigmoid") for _ in range(2)
    )
    theirs.boxes[0], own.boxes[0] = padding, targets.boxes[0, :1]
    assert not better_answers(own, theirs, targets)[:, 0].any()
    assert not better_objects(own, theirs, targets)[0].any()


def test_an_object_is_better_by_the_best_product_of_score_and_overlap():
    targets = objects(OBJECT, labels=[1])
    own = answers([EXACT, NARROW], [[0.0, 1.0], [0.0, -9.0]])  # sigmoid(1) * 1
    for logit, better in ((1.5, True), (1.01, True), (1.0, False), (0.0, False)):
        theirs = answers([EXACT, [0.1, 0.1, 0.1, 0.1]], [[9.0, logit], [0.0, 9.0]])
        assert better_objects(own, theirs, targets).tolist() == [[better]]
    narrow = torch.logit(torch.tensor(1.0).sigmoid() / 0.75).item()  # the IoU of the narrow box
    for logit, better in ((narrow + 0.01, True), (narrow - 0.01, False)):
        assert better_objects(own, answers([NARROW], [[0.0, logit]]), targets).tolist() == [[better]]
