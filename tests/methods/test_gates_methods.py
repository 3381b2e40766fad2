"""Comparisons that remain after the gate: all, none, or those in which the teacher is better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
from hf_detrkd.structures.outputs import DetectorOutput, DetectorSpec, ObjectQueries, Predictions
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests.methods.fakes import HEADS, Fake, spec, targets_of
from tests.methods.gates import OBJECT, answers, objects


WHOLE = torch.tensor([0.5, 0.5, 1.0, 1.0])
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
