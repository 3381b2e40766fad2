"""Points of a student that looks at proposals: the teacher's best boxes, and proposals near them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scipy.stats
import torch
from torch import Tensor

from hf_detrkd.methods.region_points import best_boxes, nearby_proposals
from hf_detrkd.structures.outputs import DetectorOutput, Predictions, Proposals
from tests import tiny
from tests.methods.fakes import HEADS, Fake, by_image, seeded, spec
from tests.methods.regions import HALF, LESS, OBJECT, proposing


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("count", [1, 99, 100, 101, 130])
def test_best_boxes_are_the_hundred_with_the_highest_scores(head, count):
    answers = Fake(spec(count, 1, activation=head), 2, trains=True).output.layers[0]
    found = best_boxes(answers)
    assert found.fields == {"boxes"} and found.boxes.shape == (2, min(count, 100), 4)
    assert not found.boxes.requires_grad
    for image, layer in enumerate(by_image([answers])[0]):
        ranked = sorted(range(count), key=lambda i, layer=layer: -layer.scores(i).max().item())[:100]
        assert torch.equal(found.boxes[image], answers.boxes[image, ranked])


def test_among_equal_scores_a_hundred_different_boxes_are_the_best():
    answers = Predictions(torch.zeros(1, 130, 3), tiny.random_boxes(1, 130))
    found = best_boxes(answers).boxes[0]
    assert len(found.unique(dim=0)) == 100 and all((answers.boxes[0] == box).all(-1).any() for box in found)


FAR, FARTHER = [0.1, 0.1, 0.1, 0.1], [0.9, 0.1, 0.1, 0.1]
SURE = torch.logit(torch.tensor(0.3))  # whose sigmoid is 0.3 to the last bit
UNSURE = next(z for k in range(1, 50) if (z := SURE - k * 2.0**-24).sigmoid() < SURE.sigmoid())


def looking_at(*images: list[list[float]], valid: list[list[bool]] | None = None) -> DetectorOutput:
    """A student with these proposals."""
    boxes = torch.tensor(images)
    shape = boxes.shape[:2]
    flags = torch.ones(shape, dtype=torch.bool) if valid is None else torch.tensor(valid)
    nothing = torch.zeros(shape, dtype=torch.bool)
    return replace(
        Fake(proposing(), len(images)).output,
        proposals=Proposals(boxes, torch.full(shape, -1), torch.zeros_like(boxes), flags, nothing),
    )


def seeing(*boxes: tuple[list[float], float | Tensor], images: int = 1) -> Predictions:
    """A teacher of one class with these boxes and logits."""
    logits = torch.stack([torch.as_tensor(logit) for _, logit in boxes])
    places = torch.tensor([box for box, _ in boxes])
    return Predictions(logits[None, :, None].repeat(images, 1, 1), places.expand(images, -1, -1))


def counts(student: DetectorOutput, teacher: Predictions, draws: int = 20_000, seed: int = 0) -> list[list[int]]:
    """How often each proposal was drawn, by image."""
    points = nearby_proposals(student, teacher, draws, seeded(seed))
    boxes = student.proposals.boxes
    assert points.fields == {"boxes"} and points.boxes.shape == (len(boxes), draws, 4)
    found = (points.boxes[:, :, None] == boxes[:, None]).all(-1)
    assert found.any(-1).all()
    return found.sum(1).tolist()


def assert_shares(drawn: list[int], shares: list[float]) -> None:
    assert [count > 0 for count in drawn] == [share > 0 for share in shares], drawn
    wanted = [share * sum(drawn) for share in shares if share]
    assert len(wanted) == 1 or scipy.stats.chisquare([count for count in drawn if count], wanted).pvalue > 1e-3, drawn


@pytest.mark.parametrize(
    ("proposals", "shares"),
    [
        ([OBJECT, FAR], [1 / 2, 1 / 2]),
        ([OBJECT, HALF, FAR, FARTHER, LESS], [1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6]),
        ([FAR, OBJECT, FARTHER, LESS], [1 / 6, 1 / 2, 1 / 6, 1 / 6]),
        ([HALF, OBJECT], [1 / 2, 1 / 2]),
        ([FAR, FARTHER, LESS], [1 / 3, 1 / 3, 1 / 3]),
        ([HALF], [1.0]),
        ([LESS], [1.0]),
    ],
    ids=["one of each", "the border", "one near", "no rest", "none near", "near alone", "rest alone"],
)
def test_half_of_the_points_are_near_the_teachers_boxes_and_half_are_the_rest(proposals, shares):
    teacher = seeing((OBJECT, SURE), ([0.9, 0.9, 0.1, 0.1], 5.0))
    assert_shares(counts(looking_at(proposals), teacher)[0], shares)


@pytest.mark.parametrize(("score", "near"), [(SURE, True), (UNSURE, False), (-5.0, False), (5.0, True)])
def test_boxes_of_the_teacher_count_from_a_score_of_three_tenths(score, near):
    teacher = seeing((OBJECT, score), (FARTHER, 5.0))
    student = looking_at([OBJECT, FAR, FARTHER])
    assert_shares(counts(student, teacher)[0], [1 / 4, 1 / 2, 1 / 4] if near else [1 / 4, 1 / 4, 1 / 2])


def test_no_object_is_no_score_and_each_image_has_its_own_boxes():
    logits = torch.tensor([[[9.0, 0.0, 0.0]], [[0.0, 0.0, 9.0]], [[0.0, 9.0, 0.0]]])  # no-object last
    places = torch.tensor([[OBJECT], [OBJECT], [FAR]])
    drawn = counts(looking_at(*[[OBJECT, FAR, FARTHER]] * 3), Predictions(logits, places, None, "softmax"))
    for row, shares in zip(drawn, ([1 / 2, 1 / 4, 1 / 4], [1 / 3] * 3, [1 / 4, 1 / 2, 1 / 4]), strict=True):
        assert_shares(row, shares)


def test_padded_proposals_are_never_drawn():
    valid = [[True, False, True, False], [False, False, True, True], [False, True, False, False]]
    drawn = counts(looking_at(*[[OBJECT, HALF, FAR, FARTHER]] * 3, valid=valid), seeing((OBJECT, 5.0), images=3))
    for row, shares in zip(drawn, ([1 / 2, 0, 1 / 2, 0], [0, 0, 1 / 2, 1 / 2], [0, 1.0, 0, 0]), strict=True):
        assert_shares(row, shares)


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-24], ids=["least", "highest"])
def test_the_ends_of_the_random_numbers_draw_no_padding(draw, monkeypatch):
    for count in (3, 7, 50, 491):
        boxes = torch.rand(1, count, 4) * 0.4 + 0.3
        student = looking_at(*boxes.tolist(), valid=[[False, *[True] * (count - 2), False]])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, draw))
            point = nearby_proposals(student, seeing((OBJECT, 5.0)), 1, seeded()).boxes[0]
        assert (boxes[0, 1:-1] == point).all(-1).any()


def test_an_image_without_proposals_gives_points_all_the_same():
    student = looking_at([OBJECT, FAR], [OBJECT, FAR], valid=[[True, True], [False, False]])
    points = nearby_proposals(student, seeing((OBJECT, 5.0), images=2), 7, seeded()).boxes
    assert points.shape == (2, 7, 4) and points.isfinite().all()


def test_a_batch_without_proposals_is_no_error():
    nothing = Proposals(*(values[:, :0] for values in vars(looking_at([FAR], [FAR]).proposals).values()))
    student = replace(looking_at([FAR], [FAR]), proposals=nothing)
    points = nearby_proposals(student, seeing((OBJECT, 5.0), images=2), 7, seeded()).boxes
    assert points.shape[::2] == (2, 4) and points.isfinite().all()


def test_points_follow_the_generator_and_nothing_else():
    student, teacher = Fake(proposing(), 2).output, seeing((OBJECT, 5.0), images=2)
    boxes = tiny.random_boxes(2, 50)
    student = replace(looking_at(*boxes.tolist()), layers=student.layers)
    first = nearby_proposals(student, teacher, 30, seeded(5)).boxes
    torch.manual_seed(1234)
    assert torch.equal(first, nearby_proposals(student, teacher, 30, seeded(5)).boxes)
    assert not torch.equal(first, nearby_proposals(student, teacher, 30, seeded(6)).boxes)
    assert not first.requires_grad and nearby_proposals(student, teacher, 0, seeded()).boxes.shape == (2, 0, 4)
