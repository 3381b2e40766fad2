"""The gate of the comparing losses: where a teacher does better, and what a method still compares there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_detrkd.methods import (
    KDDETR,
    CLoCKDistill,
    CLoCKDistillConfig,
    DETRDistill,
    DETRDistillConfig,
    DistillationMethod,
    KDDETRConfig,
)
from hf_detrkd.methods.gates import better_answers, better_objects
from hf_detrkd.outputs import DetectorOutput, DetectorSpec, ObjectQueries, Predictions
from hf_detrkd.targets import BatchTotals, Targets
from tests import tiny
from tests.methods import naive
from tests.methods.fakes import HEADS, Fake, by_image, spec, targets_of, truth_of


WHOLE = torch.tensor([0.5, 0.5, 1.0, 1.0])


def answers(boxes: Any, logits: Any, activation: str = "sigmoid") -> Predictions:
    boxes, logits = (torch.as_tensor(values, dtype=torch.float32)[None] for values in (boxes, logits))
    return Predictions(logits, boxes, torch.zeros(*boxes.shape[:2], 2), activation)


def objects(*boxes: list[float], labels: list[int]) -> Targets:
    return Targets.from_labels([{"class_labels": torch.tensor(labels), "boxes": torch.tensor(boxes).view(-1, 4)}])


# --- better answers --------------------------------------------------------------------------------------------------

OBJECT = [0.5, 0.5, 0.5, 0.5]
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


# --- better objects --------------------------------------------------------------------------------------------------


def test_an_object_is_better_by_the_best_product_of_score_and_overlap():
    targets = objects(OBJECT, labels=[1])
    own = answers([EXACT, NARROW], [[0.0, 1.0], [0.0, -9.0]])  # sigmoid(1) * 1
    for logit, better in ((1.5, True), (1.01, True), (1.0, False), (0.0, False)):
        theirs = answers([EXACT, [0.1, 0.1, 0.1, 0.1]], [[9.0, logit], [0.0, 9.0]])
        assert better_objects(own, theirs, targets).tolist() == [[better]]
    narrow = torch.logit(torch.tensor(1.0).sigmoid() / 0.75).item()  # the IoU of the narrow box
    for logit, better in ((narrow + 0.01, True), (narrow - 0.01, False)):
        assert better_objects(own, answers([NARROW], [[0.0, logit]]), targets).tolist() == [[better]]


# --- the methods' losses ---------------------------------------------------------------------------------------------


SHIFTS = {"left": torch.tensor([-0.0625, 0.0, 0.0, 0.0]), "right": torch.tensor([0.0625, 0.0, 0.0, 0.0])}


def output(kind: str, targets: Targets, of: DetectorSpec) -> DetectorOutput:
    """A detector that finds every object `"well"` or `"badly"`; or to the `"left"` or `"right"` of it, between its own
    class and one of the others, which is equally good."""
    batch, count = len(targets.counts), 2 * max(targets.counts)

    def layers(num_queries: int) -> tuple[Predictions, ...]:
        rows = torch.arange(num_queries) % targets.boxes.shape[1]
        boxes, labels = targets.boxes[:, rows].clone(), targets.labels[:, rows, None]
        columns = of.num_classes + (of.activation == "softmax")
        if kind in SHIFTS:
            boxes += SHIFTS[kind]
            logits = torch.full((batch, num_queries, columns), -40.0).scatter(-1, labels, 0.0)
            logits = logits.scatter(-1, (labels + (1 if kind == "left" else 2)) % of.num_classes, 0.0)
        else:
            boxes[..., 2] *= 0.9375 if kind == "well" else 0.75
            logits = 0.2 * torch.randn(batch, num_queries, columns) - 3.0
            logits = logits.scatter(-1, labels, 3.0 if kind == "well" else -3.0)
        states = torch.randn(batch, num_queries, of.width)
        return (Predictions(logits, boxes, states, of.activation),) * of.num_layers

    queries = ObjectQueries(boxes=torch.rand(batch, count, 4), content=torch.zeros(batch, count, of.width))
    maps = Fake(of, batch).output
    return replace(maps, layers=layers(count), queries=queries, decode=lambda asked: layers(asked.size))


def kd_detr(gate: str, of: tuple[DetectorSpec, DetectorSpec]) -> DistillationMethod:
    return KDDETR(KDDETRConfig(gate=gate, general_points=5), *of)


def kd_detr_released(gate: str, of: tuple[DetectorSpec, DetectorSpec]) -> DistillationMethod:
    return KDDETR(KDDETRConfig(gate=gate, general_points=5, scale="released", class_loss="bce"), *of)


def detrdistill(gate: str, of: tuple[DetectorSpec, DetectorSpec]) -> DistillationMethod:
    return DETRDistill(DETRDistillConfig(gate=gate, assignment_weight=0.0), *of)


def detrdistill_released(gate: str, of: tuple[DetectorSpec, DetectorSpec]) -> DistillationMethod:
    return DETRDistill(DETRDistillConfig(gate=gate, variant="released", assignment_weight=0.0), *of)


def clockdistill(gate: str, of: tuple[DetectorSpec, DetectorSpec]) -> DistillationMethod:
    return CLoCKDistill(CLoCKDistillConfig(gate=gate), *of)


methods = pytest.mark.parametrize(
    "method", [kd_detr, kd_detr_released, detrdistill, detrdistill_released, clockdistill]
)
heads = pytest.mark.parametrize("head", HEADS)


def losses_of(
    method: Callable, gate: str, student: str, teacher: str, head: str, targets: Targets
) -> dict[str, Tensor]:
    of = spec(activation=head, num_queries=6), spec(activation=head, num_queries=6)
    torch.manual_seed(0)
    sides = [output(kind, targets, one) for kind, one in zip((student, teacher), of, strict=True)]
    compared = method(gate, of)
    totals = BatchTotals.of(targets.counts, 6)
    return compared(*sides, targets, totals, torch.Generator().manual_seed(0))


def one_object(*labels: int) -> Targets:
    """One in each image, as large as the image: all of it is object, whichever query or cell is looked at."""
    return Targets.from_labels([{"class_labels": torch.tensor([label]), "boxes": WHOLE[None]} for label in labels])


@methods
@heads
def test_a_teacher_that_is_better_at_every_object_is_compared_as_without_a_gate(method, head):
    gated, plain = (losses_of(method, gate, "badly", "well", head, one_object(1, 0)) for gate in ("better", "none"))
    assert {n for n in plain if "background" not in n} == gated.keys()
    for name, value in gated.items():
        assert value > 1e-4
        torch.testing.assert_close(value, plain[name], msg=name)


@methods
@heads
@pytest.mark.parametrize(("student", "teacher"), [("well", "badly"), ("left", "right")])
def test_a_student_that_is_better_or_equal_everywhere_is_not_compared(method, head, student, teacher):
    gated, plain = (losses_of(method, gate, student, teacher, head, one_object(1, 0)) for gate in ("better", "none"))
    assert all(value > 1e-4 for name, value in plain.items() if "background" not in name), plain
    assert gated and all(value == 0 for value in gated.values()), gated


@methods
@heads
def test_without_objects_nothing_is_compared(method, head):
    targets = targets_of(0, 0)
    of = spec(activation=head), spec(activation=head)
    sides = Fake(of[0], trains=True).output, Fake(of[1]).output
    losses = method("better", of)(*sides, targets, BatchTotals.of((0, 0), 6), torch.Generator())
    assert losses and all(value == 0 and value.requires_grad for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()


@heads
def test_points_on_objects_weigh_what_they_weigh_without_a_gate(head):
    """What the gate takes out does not count more elsewhere: half the points, half the loss."""
    of, targets = spec(2, 1, activation=head), objects(OBJECT, labels=[1])
    student, teacher = output("badly", targets, of), output("well", targets, of)

    def alike(layer: Predictions) -> Predictions:
        """Both queries answer the same class."""
        return replace(layer, logits=layer.logits[:, :1].expand_as(layer.logits))

    own, theirs = alike(student.layers[0]), alike(teacher.layers[0])
    theirs.boxes[:, 0] = torch.tensor([0.1, 0.1, 0.1, 0.1])  # on no object
    found = []
    for gate in ("none", "better"):
        method = KDDETR(KDDETRConfig(gate=gate, general_points=0), of, of)
        sides = replace(student, decode=lambda _: (own,)), replace(teacher, layers=(theirs,))
        losses = method(*sides, targets, BatchTotals.of((1,), 2), torch.Generator())
        found.append(losses["kd_detr_class_specific_0"])
    torch.testing.assert_close(found[1], found[0] / 2)


def test_memory_and_features_of_a_worse_object_are_left_out():
    """Two objects side by side, of which the teacher finds the left one better."""
    boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]])
    targets = Targets.from_labels([{"class_labels": torch.tensor([0, 1]), "boxes": boxes}])
    of = spec(2, 1)
    student, teacher = (Fake(of, 1, trains=trains, maps=[(4, 6)]).output for trains in (True, False))
    own = replace(student, layers=(answers(boxes, [[1.0, 0, 0], [0, 3.0, 0]]),))
    found = replace(answers(boxes, [[2.0, 0, 0], [0, 2.0, 0]]), hidden_states=torch.randn(1, 2, 8))
    theirs = replace(teacher, layers=(found,))
    for method, place in (
        (CLoCKDistill(CLoCKDistillConfig(gate="better", target_queries_weight=0.0), of, of), "encoder"),
        (DETRDistill(DETRDistillConfig(gate="better", logits_weight=0.0, assignment_weight=0.0), of, of), "neck"),
    ):
        losses = method(own, theirs, targets, BatchTotals.of((2,), 2), torch.Generator())
        gradient = torch.autograd.grad(torch.stack(list(losses.values())).sum(), own.features[place][0].values)[0]
        assert gradient[..., :3].any(1).all() and not gradient[..., 3:].any()


def test_supervision_by_the_ground_truth_knows_no_gate():
    targets, of = targets_of(2, 1), (spec(), spec())
    sides = Fake(of[0], trains=True).output, Fake(of[1]).output
    found = []
    for gate in ("none", "better"):
        torch.manual_seed(3)
        config = DETRDistillConfig(gate=gate, logits_weight=0.0, feature_weight=0.0)
        found.append(DETRDistill(config, *of)(*sides, targets, BatchTotals.of((2, 1), 6), torch.Generator()))
    assert found[0].keys() == found[1].keys() and all(torch.equal(v, found[1][k]) for k, v in found[0].items())
