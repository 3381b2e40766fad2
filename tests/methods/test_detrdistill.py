"""DETRDistill's mathematics of answers and assignment against naive loops on random answers, and its options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_detrkd.methods import DETRDistill, DETRDistillConfig
from hf_detrkd.structures.targets import Targets
from tests import each
from tests.methods import naive
from tests.methods.detrdistill import ONLY_ASSIGNMENT, ONLY_LOGITS, VARIANTS, losses_of
from tests.methods.fakes import HEADS, Fake, by_image, spec, targets_of, truth_of


# queries of student and teacher, layers of both, classes, boxes of each image
SIZES = {
    "equal": (5, 5, 2, 2, 3, (2, 1)),
    "student of fewer queries": (4, 7, 1, 1, 3, (2, 3)),
    "student of more queries": (8, 5, 2, 2, 1, (1, 4)),
    "6 layers teach 3": (4, 4, 3, 6, 2, (1,)),
    "3 layers teach 6": (4, 4, 6, 3, 2, (1,)),
    "2 layers teach 3": (3, 4, 3, 2, 2, (1, 2)),
    "an image without boxes": (5, 6, 2, 2, 3, (0, 2)),
    "no boxes at all": (5, 4, 1, 1, 3, (0, 0)),
    "as many boxes as queries": (4, 4, 2, 2, 3, (4, 4)),
    "more boxes than queries": (4, 4, 1, 2, 3, (6, 1)),
    "more boxes than the student's queries": (3, 5, 1, 1, 3, (4, 0)),
}
grid = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
# A cross entropy divides by the boxes that the student's own queries can hold, however many the teacher's can.
countable = pytest.mark.parametrize(
    ("sizes", "student_head"),
    [
        pytest.param(sizes, head, id=f"{head} {name}")
        for head in HEADS
        for name, sizes in SIZES.items()
        if not (head == "softmax" and sizes[0] < min(sizes[1], max(sizes[-1])))
    ],
)


def fakes(sizes: tuple, student_head: str = "sigmoid", teacher_head: str = "sigmoid") -> tuple[Fake, Fake, Targets]:
    student_queries, teacher_queries, student_layers, teacher_layers, classes, counts = sizes
    student = Fake(spec(student_queries, student_layers, classes, student_head), len(counts), trains=True)
    teacher = Fake(spec(teacher_queries, teacher_layers, classes, teacher_head), len(counts))
    return student, teacher, targets_of(*counts, num_classes=classes)


def assert_equal(losses: dict[str, Tensor], expected: dict[tuple[str, int], Tensor], name: str) -> None:
    assert losses.keys() == {f"detrdistill_{name}_{part}_{layer}" for part, layer in expected}
    for (part, layer), value in expected.items():
        found = losses[f"detrdistill_{name}_{part}_{layer}"].double()
        wanted = torch.as_tensor(value, dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, p=(part, layer): f"{p}: {m}")


@grid
@each("variant", VARIANTS)
@each("student_head", HEADS)
@each("teacher_head", HEADS)
def test_matched_answers_equal_the_naive_computation(sizes, variant, student_head, teacher_head):
    student, teacher, targets = fakes(sizes, student_head, teacher_head)
    losses = losses_of(student, teacher, targets, variant=variant, **ONLY_LOGITS)
    layers = by_image(student.output.layers), by_image(teacher.output.layers)
    expected = naive.detrdistill_logits(*layers, truth_of(targets), released=variant == "released")
    assert_equal(losses, expected, "logits")


@pytest.mark.parametrize("variant", VARIANTS)
def test_unmatched_student_queries_get_no_gradient(variant):
    student, teacher, targets = fakes((9, 5, 1, 1, 3, (2, 1)))
    losses = losses_of(student, teacher, targets, variant=variant, **ONLY_LOGITS)
    answers = student.output.layers[0]
    logits, boxes = torch.autograd.grad(sum(losses.values()), (answers.logits, answers.boxes))
    for image in range(2):
        positive = [
            q for q, _ in naive.match_objects(by_image(teacher.output.layers)[0][image], *truth_of(targets)[image])
        ]
        mine, wanted = by_image(student.output.layers)[0][image], by_image(teacher.output.layers)[0][image]
        if variant == "paper":
            first, rest = naive.pair_answers(mine, wanted, positive)
        else:
            first, rest = naive.assign(naive.pair_cost(mine, wanted)), []
        assert set(boxes[image].any(-1).nonzero().flatten().tolist()) == {n for n, _ in first + rest}
        assert set(logits[image].any(-1).nonzero().flatten().tolist()) == {n for n, _ in first}


@pytest.mark.parametrize("counts", [(30, 0), (5, 5), (0, 0)])
def test_the_number_of_negatives_is_never_below_one(counts):
    student, teacher, targets = fakes((5, 5, 1, 1, 3, counts))
    losses = losses_of(student, teacher, targets, **ONLY_LOGITS)
    assert all(value.isfinite() and value >= 0 for value in losses.values())


@countable
@each("variant", VARIANTS)
@each("teacher_head", HEADS)
def test_the_teacher_s_queries_are_supervised_as_in_the_naive_computation(sizes, variant, student_head, teacher_head):
    student, teacher, targets = fakes(sizes, student_head, teacher_head)
    losses = losses_of(student, teacher, targets, variant=variant, **ONLY_ASSIGNMENT)
    (asked,) = student.answered
    layers = by_image(asked), by_image(teacher.output.layers)
    expected = naive.detrdistill_assignment(*layers, truth_of(targets), released=variant == "released")
    assert_equal(losses, expected, "assignment")
    assert torch.equal(student.asked[0].boxes, teacher.output.queries.boxes) and not teacher.asked


def test_the_two_variants_assign_differently():
    student, teacher, targets = fakes((5, 5, 1, 1, 3, (3, 3)))
    found = []
    for variant in VARIANTS:
        torch.manual_seed(2)
        found.append(losses_of(student, teacher, targets, variant=variant, **ONLY_ASSIGNMENT))
    assert all(abs(found[0][name] - found[1][name]) > 1e-3 for name in found[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("part", ["logits", "feature", "assignment"])
def test_a_weight_of_zero_switches_a_loss_off_and_changes_no_other(part, variant):
    student, teacher, targets = fakes((5, 6, 2, 3, 3, (2, 1)))
    torch.manual_seed(0)
    everything = losses_of(student, teacher, targets, variant=variant)
    torch.manual_seed(0)
    rest = losses_of(student, teacher, targets, variant=variant, **{f"{part}_weight": 0.0})
    assert (
        rest.keys() == {name for name in everything if not name.startswith(f"detrdistill_{part}")} < everything.keys()
    )
    assert all(torch.equal(value, everything[name]) for name, value in rest.items())
    assert len(student.asked) == (1 if part == "assignment" else 2)


def test_weights_are_those_of_the_released_code():
    method = DETRDistill(DETRDistillConfig(logits_weight=3, feature_weight=4, assignment_weight=7), spec(), spec())
    assert method.weights == {
        "detrdistill_logits_class": 3,
        "detrdistill_logits_box": 15,
        "detrdistill_logits_giou": 6,
        "detrdistill_feature": 4,
        "detrdistill_assignment_class": 14,
        "detrdistill_assignment_box": 35,
        "detrdistill_assignment_giou": 14,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits_weight": -1.0}, r"weights must be at least 0 and one of them above 0, got \(-1.0, 1.0, 1.0\)"),
        (ONLY_LOGITS | {"logits_weight": 0.0}, r"at least 0 and one of them above 0, got \(0.0, 0.0, 0.0\)"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DETRDistillConfig(**options)
