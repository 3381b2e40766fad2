"""Task-adaptive regularization: its mask, three losses and two gates against plain loops, and what it refuses."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_convert

from hf_detrkd.adapters import spec_for
from hf_detrkd.methods import TaskAdaptiveConfig, TaskAdaptiveRegularization
from hf_detrkd.methods.task_adaptive import gaussian_mask
from hf_detrkd.outputs import (
    BatchTotals,
    DetectorOutput,
    DetectorSpec,
    FeatureMap,
    ObjectQueries,
    Predictions,
    Proposals,
    Targets,
)
from hf_detrkd.teacher import Teacher
from tests import tiny
from tests.methods import naive
from tests.methods.fakes import spec, targets_of


HEADS = ("sigmoid", "softmax")
GATES = ("better", "foreground")
CLASSES = 3
DISTANCES = ("task_adaptive_class_0", "task_adaptive_box_0")
PASSES = ("task_adaptive_class_pass", "task_adaptive_box_pass")
Sizes = Sequence[tuple[int, int]]


def proposing(head: str = "softmax", widths: Sequence[int] = (4,)) -> DetectorSpec:
    return replace(spec(1, 1, CLASSES, head, "boxes", neck=widths), one_to_one=False)


def method_of(
    student: DetectorSpec | None = None, teacher: DetectorSpec | None = None, **options: Any
) -> TaskAdaptiveRegularization:
    specs = student or proposing(), teacher or spec(num_classes=CLASSES, neck=(4,))
    return TaskAdaptiveRegularization(TaskAdaptiveConfig(**options), *specs)


def objects(*images: list[list[float]]) -> Targets:
    """Boxes of class 0."""
    rows = (torch.tensor(boxes).view(-1, 4) for boxes in images)
    return Targets.from_labels([{"class_labels": torch.zeros(len(b), dtype=torch.long), "boxes": b} for b in rows])


# --- the mask --------------------------------------------------------------------------------------------------------

KINDS = {
    "somewhere": [[0.47, 0.36, 0.31, 0.42]],
    "below one cell": [[0.52, 0.41, 0.011, 0.013], [0.071, 0.93, 0.02, 0.3]],
    "one pixel of a thousand": [[0.3337, 0.777, 0.001, 0.001]],
    "at the borders": [[0.1, 0.1, 0.2, 0.2], [0.93, 0.9, 0.14, 0.2]],
    "over the borders": [[0.0, 0.97, 0.3, 0.2], [1.0, 0.02, 0.15, 0.4]],
    "the whole image": [[0.5, 0.5, 1.0, 1.0]],
    "overlapping": [[0.4, 0.4, 0.4, 0.5], [0.55, 0.5, 0.5, 0.3], [0.5, 0.45, 0.1, 0.1]],
    "none": [],
}


def a_map(channels: int, size: tuple[int, int], batch: int, padded: bool = False, trains: bool = False) -> FeatureMap:
    """A random map; the last image of a padded batch has three quarters of the height and half of the width."""
    values = torch.randn(batch, channels, *size).requires_grad_(trains)
    real = torch.ones(batch, *size, dtype=torch.bool)
    if padded:
        real[-1, math.ceil(size[0] * 0.75) :] = False
        real[-1, :, math.ceil(size[1] * 0.5) :] = False
    return FeatureMap(values, ~real if padded else None)


def real_size(features: FeatureMap, image: int) -> tuple[int, int]:
    if features.padding is None:
        return tuple(features.values.shape[-2:])
    cells = (~features.padding[image]).nonzero().tolist()
    return max(y for y, _ in cells) + 1, max(x for _, x in cells) + 1


def bells(boxes: Tensor, height: int, width: int) -> Tensor:
    """Of one image, whose part of the map is `height` x `width` cells."""
    mask = torch.zeros(height, width, dtype=torch.float64)
    for box in boxes:
        x0, y0, w, h = box.tolist()
        for y, x in naive.cells_of(box, height, width):
            away = (((x + 0.5) / width - x0) / (w / 2)) ** 2 + (((y + 0.5) / height - y0) / (h / 2)) ** 2
            mask[y, x] = max(float(mask[y, x]), math.exp(-away / 2))
    return mask


@pytest.mark.parametrize("size", [(1, 1), (4, 5), (7, 3), (16, 13)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_mask_equals_the_loop(size, kind, padded):
    # Rows of padding differ in number: three boxes in the first image.
    targets = objects(KINDS["overlapping"], KINDS["somewhere"], KINDS[kind])
    targets.boxes[~targets.valid] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    goal = a_map(4, size, 3, padded)
    found = gaussian_mask(targets, goal)
    expected = torch.zeros(found.shape, dtype=torch.float64)
    for image, label in enumerate(targets.to_labels()):
        height, width = real_size(goal, image)
        expected[image, :height, :width] = bells(label["boxes"].double(), height, width)
    assert found.shape == (3, *size)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    assert padded is (goal.padding is not None) and not (padded and found[goal.padding].any())
    assert found[0].max() > 0.5 and (kind != "none" or not found[2].any())


def test_the_mask_is_one_at_the_middle_of_a_box_and_falls_by_its_own_sides():
    mask = gaussian_mask(objects([[0.5, 0.5, 1.0, 0.6]]), a_map(1, (5, 5), 1))[0]
    row = [math.exp(-((x / 5 / 0.5) ** 2) / 2) for x in (-2, -1, 0, 1, 2)]
    torch.testing.assert_close(mask[2], torch.tensor(row))
    torch.testing.assert_close(mask[:, 2], torch.tensor([0.0, math.exp(-2 / 9), 1.0, math.exp(-2 / 9), 0.0]))


# --- features --------------------------------------------------------------------------------------------------------


def output(
    maps: Sequence[FeatureMap],
    others: Sequence[FeatureMap] = (),
    answers: Predictions | None = None,
    proposals: Proposals | None = None,
) -> DetectorOutput:
    """A detector that answers every question alike."""
    if answers is None:
        answers = Predictions(torch.zeros(1, 1, CLASSES), torch.full((1, 1, 4), 0.5))
    features = {"neck": tuple(maps), "encoder": tuple(others or maps)}
    own = ObjectQueries(boxes=answers.boxes.detach())
    return DetectorOutput((answers,), own, features, lambda asked: (answers,), proposals=proposals)


def naive_features(own: FeatureMap, goal: FeatureMap, targets: Targets, weight: Tensor, bias: Tensor) -> Tensor:
    """One level, the student's channels changed by `weight` `(D, own channels)` and `bias`: the sum over images."""
    total = torch.zeros((), dtype=torch.float64)
    for image, label in enumerate(targets.to_labels()):
        height, width = real_size(goal, image)
        own_height, own_width = real_size(own, image)
        mine = torch.einsum("dc,cyx->dyx", weight, own.values[image, :, :own_height, :own_width].double())
        mine = naive.bilinear(mine + bias[:, None, None], height, width)
        mask = bells(label["boxes"].double(), height, width)
        for y, x in itertools.product(range(height), range(width)):
            for wanted, given in zip(goal.values[image, :, y, x].double(), mine[:, y, x], strict=True):
                share = 2 * len(weight) * max(float(mask.sum()), 1.0)
                total = total + mask[y, x] * (wanted - given) ** 2 / share
    return total


@pytest.mark.parametrize(
    ("sizes", "widths", "goals", "nearest"),
    [
        ([(4, 5)], (4,), [(4, 5)], [0]),
        ([(4, 5)], (3,), [(4, 5)], [0]),
        ([(9, 10), (3, 6)], (4, 3), [(5, 5), (2, 3)], [0, 1]),
        ([(3, 4)], (5,), [(6, 7)], [0]),
        ([(13, 12), (6, 6), (2, 2)], (4, 3, 4), [(7, 7), (3, 3)], [0, 0, 1]),
        ([(8, 8), (3, 4)], (3, 4), [(16, 12), (9, 9), (4, 4), (1, 1)], [1, 2]),
    ],
    ids=["equal", "projected", "finer", "coarser", "fewer levels", "more levels"],
)
@pytest.mark.parametrize("counts", [(2, 0, 1), (3,), (0, 0)], ids=str)
@pytest.mark.parametrize("padded", ["", "both", "student", "teacher"])
@pytest.mark.parametrize("level", ["neck", "encoder"])
def test_features_equal_the_loop_on_every_level(sizes: Sizes, widths, goals: Sizes, nearest, counts, padded, level):
    specs = proposing(widths=widths), spec(neck=(4,) * len(goals))
    method, targets, batch = method_of(*specs, feature_level=level), targets_of(*counts), len(counts)
    ends = padded in ("both", "student"), padded in ("both", "teacher")
    own = [a_map(width, size, batch, ends[0]) for width, size in zip(widths, sizes, strict=True)]
    theirs = [a_map(4, size, batch, ends[1]) for size in goals]
    wrong = [a_map(width, (2, 2), batch) for width in widths], [a_map(4, (2, 2), batch) for _ in goals]
    places = ((own, wrong[0]), (theirs, wrong[1]))
    sides = [output(*(pair if level == "neck" else pair[::-1])) for pair in places]
    losses = method(*sides, targets, replace(BatchTotals.of(counts, 1), images=7.0), torch.Generator())
    assert losses.keys() == {f"task_adaptive_features_{k}" for k in range(len(sizes))}
    for k, (mine, place) in enumerate(zip(own, nearest, strict=True)):
        layer = method.projections[k]
        equal = widths[k] == 4
        weight = torch.eye(4).double() if equal else layer.weight.detach().double()[:, :, 0, 0]
        bias = torch.zeros(4).double() if equal else layer.bias.detach().double()
        expected = naive_features(mine, theirs[place], targets, weight, bias) / 7
        torch.testing.assert_close(losses[f"task_adaptive_features_{k}"].double(), expected, atol=1e-5, rtol=1e-4)
        assert (expected > 1e-3) == (sum(counts) > 0)


# --- classes and boxes of proposals ----------------------------------------------------------------------------------


def around(boxes: Tensor, spread: float) -> Tensor:
    return (boxes * (1 + spread * torch.randn_like(boxes)).clamp(0.4, 1.6)).clamp(0.01, 0.99)


def proposals_of(targets: Targets, backgrounds: Sequence[int]) -> Proposals:
    """Of every object the box itself and four near it, then background; what is padded looks like an object."""
    rows: list[list[tuple[Tensor, int, Tensor, bool]]] = []
    for label, count in zip(targets.to_labels(), backgrounds, strict=True):
        rows.append([])
        for box, c in zip(label["boxes"], label["class_labels"].tolist(), strict=True):
            rows[-1] += [(box, c, box, True), *((around(box, 0.25), c, box, False) for _ in range(4))]
        rows[-1] += [(tiny.random_boxes(), -1, tiny.random_boxes(), False) for _ in range(count)]
    shape = len(rows), max(map(len, rows))
    found = Proposals(
        tiny.random_boxes(*shape),
        torch.ones(shape, dtype=torch.long),
        tiny.random_boxes(*shape),
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(shape, dtype=torch.bool),
    )
    for image, row in enumerate(rows):
        for n, (box, c, matched, added) in enumerate(row):
            found.boxes[image, n], found.labels[image, n], found.matched[image, n] = box, c, matched
            found.valid[image, n], found.added[image, n] = True, added
    return found


def answers_to(proposals: Proposals, head: str, trains: bool = False, per_class: bool = True) -> Predictions:
    """Random ones near the proposals."""
    shape = proposals.boxes.shape[:2]
    class_boxes = around(proposals.boxes[:, :, None].expand(*shape, CLASSES, 4), 0.15).requires_grad_(trains)
    logits = (2 * torch.randn(*shape, CLASSES + (head == "softmax"))).requires_grad_(trains)
    boxes = tiny.random_boxes(*shape) if per_class else around(proposals.boxes, 0.15)
    return Predictions(logits, boxes, None, head, class_boxes=class_boxes if per_class else None)


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


# --- all three together ----------------------------------------------------------------------------------------------


def whole(counts: tuple[int, ...] = (2, 1), widths: Sequence[int] = (4, 3), **options: Any) -> Any:
    """Method, student, teacher and targets."""
    targets = targets_of(*counts)
    proposals = proposals_of(targets, [3] * len(counts))
    student, teacher = answers_to(proposals, "softmax", trains=True), answers_to(proposals, "softmax")
    own = [a_map(w, (4, 4), len(counts), trains=True) for w in widths]
    theirs = [a_map(4, (4, 4), len(counts))]
    method = method_of(proposing(widths=widths), **options)
    return method, output(own, answers=student, proposals=proposals), output(theirs, answers=teacher), targets


def run(method: TaskAdaptiveRegularization, student: Any, teacher: Any, targets: Targets) -> dict[str, Tensor]:
    return method(student, teacher, targets, BatchTotals.of(targets.counts, 1), torch.Generator())


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([value for name, value in losses.items() if name not in PASSES]).sum()


@pytest.mark.parametrize("gate", GATES)
def test_a_student_that_is_its_teacher_has_no_loss(gate):
    method, student, _, targets = whole(widths=(4,), class_gate=gate)
    losses = run(method, student, student, targets)
    assert losses.keys() == {"task_adaptive_features_0", *DISTANCES, *PASSES} and losses["task_adaptive_box_pass"] > 0
    classes = losses.pop("task_adaptive_class_0")
    assert total(losses) == 0 and (classes == 0 if gate == "better" else abs(classes) < 1e-6)


def test_gradients_reach_features_logits_boxes_and_projections():
    method, student, teacher, targets = whole()
    leaves = [m.values for m in student.features["neck"]]
    leaves += [student.layers[0].logits, student.layers[0].class_boxes, *method.parameters()]
    losses = run(method, student, teacher, targets)
    assert all(losses[name].requires_grad for name in losses if name not in PASSES)
    for gradient in torch.autograd.grad(total(losses), leaves):
        assert gradient.any() and gradient.isfinite().all()


def test_a_call_leaves_nothing_behind_and_draws_no_random_numbers():
    method, *first = whole()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    assert before.keys() == {"projections.1.weight", "projections.1.bias"}
    attributes, losses = set(vars(method)), run(method, *first)
    run(method, *whole((1, 4, 0))[1:])
    torch.manual_seed(77)
    again = run(method, *first)
    assert losses.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in losses.items())
    assert set(vars(method)) == attributes and torch.equal(torch.rand(1), torch.rand(1, generator=seeded(77)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_losses_are_computed_in_float32_under_autocast():
    method, *sides = whole()
    expected = run(method, *sides)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(method, *sides)
    assert all(
        found[name].dtype == torch.float32 and torch.equal(found[name], value) for name, value in expected.items()
    )


@pytest.mark.parametrize("case", ["no objects", "no foreground", "no valid proposal", "no proposals", "one pixel"])
@pytest.mark.parametrize("gate", GATES)
def test_nothing_to_learn_gives_zero_with_a_graph_and_no_nan(case, gate):
    method, student, teacher, targets = whole((0, 0) if case == "no objects" else (2, 1), class_gate=gate)
    proposals, answers, wanted = student.proposals, student.layers[0], teacher.layers[0]
    if case == "no foreground":
        proposals = replace(proposals, labels=torch.full_like(proposals.labels, -1))
    elif case == "no valid proposal":
        proposals = replace(proposals, valid=torch.zeros_like(proposals.valid))
    elif case == "no proposals":
        proposals = Proposals(*(values[:, :0] for values in vars(proposals).values()))
        answers, wanted = answers.rows(0, 0), wanted.rows(0, 0)
    elif case == "one pixel":
        for boxes in (proposals.boxes, proposals.matched, targets.boxes, wanted.class_boxes, answers.class_boxes.data):
            boxes[..., 2:] = 1 / 1024
        answers.class_boxes.data[:, ::2, :, 2:] = 0.0  # clipped away
    student, teacher = replace(student, layers=(answers,), proposals=proposals), replace(teacher, layers=(wanted,))
    teacher = replace(teacher, decode=lambda _: (wanted,))
    losses = run(method, student, teacher, targets)
    assert all(value.isfinite() for value in losses.values())
    if case != "one pixel":
        assert all(losses[name] == 0 for name in (*DISTANCES, *PASSES))
        assert (losses["task_adaptive_features_0"] == 0) == (case == "no objects")
    leaves = [student.features["neck"][0].values, answers.logits, answers.class_boxes]
    gradients = torch.autograd.grad(total(losses), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


# --- what is asked, and what is refused ------------------------------------------------------------------------------


def test_the_teacher_is_asked_at_the_students_proposals():
    method, student, teacher, targets = whole()
    for content, fields in (("zero", {"content", "boxes"}), ("own", {"boxes"})):
        method = method_of(proposing(widths=(4, 3)), content=content)
        asked = method.questions(student, teacher, targets, torch.Generator())
        assert not asked.student and asked.teacher.keys() == {"proposals"}
        queries = asked.teacher["proposals"]
        assert queries.fields - {"groups"} == fields and torch.equal(queries.boxes, student.proposals.boxes)
        assert content == "own" or (queries.content.shape[-1] == 8 and not queries.content.any())


@pytest.mark.parametrize("content", ["zero", "own"])
def test_padding_is_no_query_that_a_real_proposal_sees(content):
    """A decoder's queries see each other: an image's answers must not follow the number of proposals of another."""
    teacher = Teacher(tiny.build("dino_detr"), tiny.LABELS)
    _, student, _, targets = whole((3, 0))
    method = method_of(proposing(widths=(4, 3)), teacher.spec, content=content)
    encoded = teacher(tiny.batch(64)["pixel_values"])
    queries = method.questions(student, encoded, targets, torch.Generator()).teacher["proposals"]
    answers = encoded.decode(queries)[-1]
    count = int(student.proposals.valid[1].sum())
    alone = encoded.decode(ObjectQueries(**{k: vars(queries)[k][:, :count] for k in queries.fields}))[-1]
    assert 0 < count < queries.size
    torch.testing.assert_close(answers.logits[1, :count], alone.logits[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(answers.boxes[1, :count], alone.boxes[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["yolos", "detr"])
def test_a_teacher_that_cannot_be_asked_at_boxes_is_refused_for_proposals(family):
    teacher = spec_for(tiny.config(family))
    message = (
        f"The proposals of a fake student are boxes, which a {family} teacher cannot be asked about: choose another "
        "teacher, or set proposals to false and get the features alone."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        method_of(proposing(), teacher)
    assert method_of(proposing(), teacher, proposals=False).weights == {"task_adaptive_features": 1.0}
    assert method_of(spec(neck=(4,)), teacher).weights == {"task_adaptive_features": 1.0}


def test_a_student_of_one_to_one_queries_gets_the_features_alone():
    _, student, teacher, targets = whole(widths=(4,))
    off = method_of(proposing(), proposals=False)
    for method in (method_of(spec(neck=(4,))), off):
        assert method.weights == {"task_adaptive_features": 1.0}
        asked = method.questions(student, teacher, targets, torch.Generator())
        assert not asked.student and not asked.teacher
        assert run(method, student, teacher, targets).keys() == {"task_adaptive_features_0"}
    parts = ("features", "class", "box")
    assert method_of().weights == {f"task_adaptive_{part}": 1.0 for part in parts}
    without = replace(student, proposals=None)
    assert run(method_of(), without, teacher, targets).keys() == {"task_adaptive_features_0"}


@pytest.mark.parametrize(("option", "value"), [("feature_level", "memory"), ("class_gate", "always")])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option} must be .* got '{value}'"):
        TaskAdaptiveConfig(**{option: value})
