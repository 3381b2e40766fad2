"""Task-adaptive regularization of classes and boxes: both losses and both gates against plain loops."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_convert

from hf_detrkd.structures.outputs import Predictions, Proposals
from hf_detrkd.structures.targets import BatchTotals
from tests.methods import naive
from tests.methods.fakes import HEADS, spec, targets_of
from tests.methods.task_adaptive import (
    CLASSES,
    DISTANCES,
    GATES,
    PASSES,
    a_map,
    answers_to,
    around,
    method_of,
    objects,
    output,
    proposals_of,
    proposing,
)


def compare(
    student: Predictions, teacher: Predictions, proposals: Proposals, trains: bool = False, **options: Any
) -> dict[str, Tensor]:
    """All but the features."""
    batch = len(proposals.boxes)
    method = method_of(proposing(student.activation), spec(num_classes=CLASSES, neck=(4,)), **options)
    maps = [[a_map(4, (2, 2), batch)] for _ in range(2)]
    sides = output(maps[0], answers=student, proposals=proposals), output(maps[1], answers=teacher)
    losses = method(*sides, objects(*[[]] * batch), BatchTotals.of((0,) * batch, 1), torch.Generator())
    assert losses.pop("task_adaptive_features_0") == 0 and losses.keys() == {*DISTANCES, *PASSES}
    return losses


def naive_proposals(student: Predictions, teacher: Predictions, proposals: Proposals, gate: str) -> dict[str, Tensor]:
    """Class term, box term and the two pass rates, proposal by proposal."""
    coder, beta = BoxCoder((10.0, 10.0, 5.0, 5.0)), 1 / 9
    known = [True] * CLASSES if teacher.known is None else teacher.known.tolist()
    names = [c for c in range(CLASSES) if known[c]]
    classes, moves, passes, judged, proposed = [], [], [0, 0], 0, 0

    def layer(side: Predictions, i: int, n: int, c: int) -> naive.Layer:
        """One proposal's logits of the classes that both know, and its box of the class."""
        columns = [*names, CLASSES] if side.activation == "softmax" else names
        box = side.boxes[i, n] if side.class_boxes is None else side.class_boxes[i, n, c]
        return naive.Layer(side.logits.detach()[i, n, columns][None].double(), box[None].double(), side.activation)

    for i, n in itertools.product(*map(range, proposals.boxes.shape[:2])):
        if not proposals.valid[i, n]:
            continue
        proposed += 1
        c = int(proposals.labels[i, n])
        if c < 0:
            continue
        added = bool(proposals.added[i, n])
        judged += not added
        if not known[c]:
            continue
        own, theirs = layer(student, i, n, c), layer(teacher, i, n, c)
        proposal, truth = proposals.boxes[i, n].double(), proposals.matched[i, n].double()
        if gate == "foreground" or theirs.scores(0)[names.index(c)] > own.scores(0)[names.index(c)]:
            wanted = naive.soft_targets(theirs, 0, student.activation)
            classes.append(naive.class_divergence(own.logits[0], wanted, student.activation))
            passes[0] += not added
        if naive.iou(theirs.boxes[0], truth) > naive.iou(proposal, truth):
            origin = box_convert(proposal[None], "cxcywh", "xyxy")
            mine, wanted = (
                coder.encode_single(box_convert(side.boxes, "cxcywh", "xyxy"), origin)[0] for side in (own, theirs)
            )
            for a, b in zip(mine, wanted, strict=True):
                distance = abs(a - b)
                moves.append(distance**2 / (2 * beta) if distance < beta else distance - beta / 2)
            passes[1] += not added
    values = (
        sum(classes) / max(len(classes), 1),
        sum(moves) / max(proposed, 1),
        *(p / max(judged, 1) for p in passes),
    )
    return {k: torch.as_tensor(v).double() for k, v in zip((*DISTANCES, *PASSES), values, strict=True)}


@pytest.mark.parametrize("student_head", HEADS)
@pytest.mark.parametrize("teacher_head", HEADS)
@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("known", [None, (True, False, True)], ids=["all known", "one unknown"])
def test_classes_boxes_and_pass_rates_equal_the_loop(student_head, teacher_head, per_class, gate, known):
    rates: dict[str, list[float]] = {name: [] for name in PASSES}
    for counts, backgrounds in (((2, 0, 3), (3, 2, 4)), ((1, 0), (0, 0)), ((3,), (1,)), ((4, 2), (0, 7))):
        proposals = proposals_of(targets_of(*counts), backgrounds)
        student, teacher = answers_to(proposals, student_head), answers_to(proposals, teacher_head, False, per_class)
        if known is not None:
            teacher.logits[..., :CLASSES][..., ~torch.tensor(known)] = -1e4
            teacher = replace(teacher, known=torch.tensor(known))
        losses = compare(student, teacher, proposals, class_gate=gate)
        for name, value in naive_proposals(student, teacher, proposals, gate).items():
            found = losses[name].double()
            torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        for name in PASSES:
            rates[name].append(float(losses[name]))
    all_pass = gate == "foreground" and known is None
    assert 0 < sum(rates[PASSES[0]]) < 4 or (all_pass and rates[PASSES[0]] == [1.0] * 4)
    assert 0 < sum(rates[PASSES[1]]) < 4


EXACT, LEFT, RIGHT = [0.5, 0.5, 0.5, 0.5], [0.4375, 0.5, 0.5, 0.5], [0.5625, 0.5, 0.5, 0.5]


def one(box: list[float], label: int = 0, added: bool = False) -> Proposals:
    """One proposal, of an object that lies at `EXACT`."""
    flags = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[added]])
    return Proposals(torch.tensor([[box]]), torch.tensor([[label]]), torch.tensor([[EXACT]]), *flags)


def answer(logits: list[float], box: list[float], head: str = "softmax") -> Predictions:
    return Predictions(torch.tensor([[logits]]), torch.tensor([[box]]), None, head)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("more", "passes"), [(0.0, False), (1e-5, True), (-1e-5, False)], ids=["equal", "up", "down"])
def test_classes_are_taken_over_where_the_teachers_score_is_higher_and_not_where_it_is_equal(head, gate, more, passes):
    """Both give the object's class one half, and the rest to other classes."""
    rest = [-40.0] if head == "softmax" else []
    student, teacher = answer([0.0, 0.0, -40.0, *rest], LEFT, head), answer([more, -40.0, 0.0, *rest], LEFT, head)
    losses = compare(student, teacher, one(LEFT), class_gate=gate)
    on = passes or gate == "foreground"
    assert losses["task_adaptive_class_pass"] == on and (losses["task_adaptive_class_0"] > 1) == on
    assert on or losses["task_adaptive_class_0"] == 0


@pytest.mark.parametrize(
    ("proposal", "theirs", "passes"),
    [
        (LEFT, RIGHT, False),
        (LEFT, [0.5615234375, 0.5, 0.5, 0.5], True),
        (LEFT, [0.5634765625, 0.5, 0.5, 0.5], False),
        (LEFT, EXACT, True),
        (EXACT, RIGHT, False),
        (EXACT, EXACT, False),
    ],
    ids=["mirrored", "a hair nearer", "a hair farther", "exact", "from the object", "at the object"],
)
def test_boxes_are_taken_over_where_the_teacher_overlaps_more_and_not_where_it_is_equal(proposal, theirs, passes):
    logits = [0.0] * 4
    losses = compare(answer(logits, [0.3, 0.3, 0.2, 0.2]), answer(logits, theirs), one(proposal))
    assert losses["task_adaptive_box_pass"] == passes and (losses["task_adaptive_box_0"] > 0) == passes


def test_an_added_object_takes_over_no_box_and_is_in_no_pass_rate():
    for _ in range(20):
        targets = targets_of(4, 3)
        proposals = proposals_of(targets, (0, 0))
        proposals = replace(proposals, valid=proposals.added)
        student, teacher = answers_to(proposals, "softmax", trains=True), answers_to(proposals, "softmax")
        teacher = replace(teacher, class_boxes=around(teacher.class_boxes, 1e-7))  # as near as rounding allows
        losses = compare(student, teacher, proposals, class_gate="foreground")
        assert losses["task_adaptive_box_0"] == 0 and losses["task_adaptive_class_0"] > 0
        assert all(losses[name] == 0 for name in PASSES)


def test_the_box_is_that_of_the_objects_class_on_both_sides():
    proposals = one(LEFT, label=1)
    near, far = torch.tensor(EXACT), torch.tensor([0.1, 0.1, 0.05, 0.05])
    student, teacher = (answer([9.0, 0.0, 0.0, 0.0], [0.9, 0.9, 0.1, 0.1]) for _ in range(2))
    right = torch.stack([far, near, far])[None, None]
    student = replace(student, class_boxes=right.clone().requires_grad_(True))
    teacher = replace(teacher, class_boxes=right)
    losses = compare(student, teacher, proposals)
    assert losses["task_adaptive_box_pass"] == 1 and losses["task_adaptive_box_0"] == 0
    moved = replace(student, class_boxes=around(right, 0.3).requires_grad_(True))
    loss = compare(moved, teacher, proposals)["task_adaptive_box_0"]
    (gradient,) = torch.autograd.grad(loss, moved.class_boxes)
    assert gradient[0, 0, 1].all() and not gradient[0, 0, [0, 2]].any()


@pytest.mark.parametrize("head", HEADS)
def test_the_gradient_of_the_class_term_is_that_of_the_teacher_first_divergence(head):
    """`KL(teacher || student)` has the gradient `p_student - p_teacher`; no other order has."""
    proposals = proposals_of(targets_of(2, 1), (2, 5))
    student, teacher = answers_to(proposals, head, trains=True), answers_to(proposals, head)
    loss = compare(student, teacher, proposals, class_gate="foreground")["task_adaptive_class_0"]
    (gradient,) = torch.autograd.grad(loss, student.logits)
    p, q = (z.softmax(-1) if head == "softmax" else z.sigmoid() for z in (student.logits, teacher.logits))
    chosen = (proposals.valid & (proposals.labels >= 0))[..., None]
    torch.testing.assert_close(gradient, chosen * (p - q).detach() / chosen.sum(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("gate", GATES)
def test_background_and_padding_count_nowhere_but_in_the_number_of_proposals(gate):
    proposals = proposals_of(targets_of(2, 1), (2, 5))
    student, teacher = answers_to(proposals, "softmax", trains=True), answers_to(proposals, "softmax")
    object_rows = proposals.valid & (proposals.labels >= 0)
    before = compare(student, teacher, proposals, class_gate=gate)
    gradients = torch.autograd.grad(before[DISTANCES[0]] + before[DISTANCES[1]], (student.logits, student.class_boxes))
    assert all(g[object_rows].any() and not g[~object_rows].any() for g in gradients)
    for side in (student, teacher):
        side.logits.data[~object_rows] *= -70
        side.class_boxes.data[~object_rows] = 0.0
    proposals.boxes[~proposals.valid] = 0.0
    proposals.matched[~object_rows] = 0.0
    after = compare(student, teacher, proposals, class_gate=gate)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    more = replace(proposals, valid=torch.ones_like(proposals.valid), labels=proposals.labels.clone())
    more.labels[~object_rows] = -1
    found, ratio = compare(student, teacher, more, class_gate=gate), proposals.valid.sum() / proposals.valid.numel()
    torch.testing.assert_close(found["task_adaptive_box_0"], before["task_adaptive_box_0"] * ratio)
    torch.testing.assert_close(found["task_adaptive_class_0"], before["task_adaptive_class_0"])
