"""KD-DETR for a student with a box for every class, against a loop."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hf_detrkd.methods import KDDETR, DETRDistill, DETRDistillConfig, ExtraQueries, ExtraQueriesConfig, KDDETRConfig
from hf_detrkd.methods.query_losses import PointsConfig, point_losses
from hf_detrkd.methods.region_points import best_boxes, nearby_proposals
from hf_detrkd.structures.outputs import Predictions, Proposals
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import tiny
from tests.methods import naive
from tests.methods.fakes import HEADS, Fake, by_image, seeded, spec, targets_of
from tests.methods.regions import GROUPS, LESS, OBJECT, PARTS, proposing


@dataclass
class Proposing(Fake):
    """Answers with a box for every class, and proposals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        boxes, flags = tiny.random_boxes(self.batch_size, 9), torch.ones(self.batch_size, 9, dtype=torch.bool)
        proposals = Proposals(boxes, torch.full(flags.shape, -1), boxes, flags, ~flags)
        self.output = replace(self.output, proposals=proposals)

    def answer(self, num_queries: int) -> tuple[Predictions, ...]:
        shape = self.batch_size, num_queries, self.spec.num_classes
        boxes = (tiny.random_boxes(*shape).requires_grad_(self.trains) for _ in range(self.spec.num_layers))
        return tuple(replace(x, class_boxes=b) for x, b in zip(super().answer(num_queries), boxes, strict=True))


def naive_points(student: Predictions, teacher: Predictions, tempered: bool, temperature: float) -> list[list[Tensor]]:
    """By image and query: class, L1, `1 - GIoU`. No-object is in the class term of own probabilities alone."""
    rows = []
    for i, (own, theirs) in enumerate(zip(by_image([student])[0], by_image([teacher])[0], strict=True)):
        rows.append([])
        for n in range(len(own.boxes)):
            best = int(theirs.scores(n).argmax())
            box, wanted = student.class_boxes[i, n, best].double(), theirs.boxes[n]
            if tempered:
                classes = len(own.scores(n))
                logits = [side.logits[n][:classes] for side in (theirs, own)]
                divergence = temperature**2 * naive.kl(*logits, temperature)
            else:
                targets = naive.soft_targets(theirs, n, "softmax")
                divergence = naive.class_divergence(own.logits[n], targets, "softmax")
            rows[-1].append(torch.stack([divergence, naive.l1(box, wanted), 1 - naive.giou(box, wanted)]))
    return rows


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("class_loss", ["softmax_kl", "bce"])
@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("temperature", [10.0, 2.5])
def test_point_losses_equal_the_loop(head, class_loss, classes, temperature):
    student, teacher = Proposing(proposing(classes)), Fake(spec(6, 1, classes, head))
    own, theirs = student.output.layers[0], teacher.output.layers[0]
    config = PointsConfig(class_loss=class_loss, temperature=temperature)
    tempered = class_loss == "softmax_kl" and classes > 1
    expected = torch.stack([torch.stack(row) for row in naive_points(own, theirs, tempered, temperature)])
    found = point_losses(own, theirs, config, one_to_one=False)
    torch.testing.assert_close(found.double(), expected.movedim(-1, 0), rtol=2e-4, atol=2e-6)


def test_no_object_has_no_part_in_the_class_term():
    student, teacher = Proposing(proposing(), trains=True), Fake(spec(6, 1, 3, "softmax"))
    own, theirs = student.output.layers[0], teacher.output.layers[0]
    before = point_losses(own, theirs, PointsConfig(), one_to_one=False)[0]
    (gradient,) = torch.autograd.grad(before.sum(), own.logits)
    assert gradient[..., :-1].all() and not gradient[..., -1].any()
    p, q = ((side.logits[..., :-1] / 10).softmax(-1) for side in (own, theirs))
    torch.testing.assert_close(gradient[..., :-1], 10 * (p - q).detach(), atol=1e-6, rtol=1e-4)  # the teacher first
    best = theirs.scores().argmax(-1)
    for side in (own, theirs):
        side.logits.data[..., -1] = 3 * torch.randn(2, 6)
    assert torch.equal(best, theirs.scores().argmax(-1))
    assert torch.equal(before, point_losses(own, theirs, PointsConfig(), one_to_one=False)[0])


def test_classes_that_the_teacher_does_not_know_are_left_out():
    student, teacher = Proposing(proposing(4)).output.layers[0], Fake(spec(6, 1, 4, "softmax")).output.layers[0]
    known = torch.tensor([True, False, True, True])
    teacher.logits[..., 1] = -1e4
    teacher = replace(teacher, known=known)
    columns = torch.tensor([0, 2, 3])
    fewer = (
        replace(student, logits=student.logits[..., [0, 2, 3, 4]], class_boxes=student.class_boxes[:, :, columns]),
        replace(teacher, logits=teacher.logits[..., [0, 2, 3, 4]], known=None),
    )
    for class_loss in ("softmax_kl", "bce"):
        config = PointsConfig(class_loss=class_loss)
        found, expected = (point_losses(*pair, config, False) for pair in ((student, teacher), fewer))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("foreground", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_both_are_asked_the_same_places_and_weighed_by_the_teachers_score(head, foreground):
    student, teacher = Proposing(proposing()), Fake(spec(5, 2, 3, head))
    config = KDDETRConfig(general_points=11, foreground_weight=foreground, proposal_targets="asked")
    method = KDDETR(config, student.spec, teacher.spec)
    losses = method(student.output, teacher.output, targets_of(1, 1), BatchTotals.of((1, 1), 5), seeded(3))
    expected = (
        best_boxes(teacher.output.layers[-1]),
        nearby_proposals(student.output, teacher.output.layers[-1], 11, seeded(3)),
    )
    assert losses.keys() == {f"kd_detr_{part}_{group}_0" for part, group in itertools.product(PARTS, GROUPS)}
    for k, group in enumerate(GROUPS):
        asked = student.asked[k], teacher.asked[k]
        assert all(torch.equal(queries.boxes, expected[k].boxes) for queries in asked)
        own, theirs = student.answered[k][-1], teacher.answered[k][-1]
        terms = naive_points(own, theirs, True, 10.0)
        sums = torch.zeros(3, dtype=torch.float64)
        for row, layer in zip(terms, by_image([theirs])[0], strict=True):
            weights = [float(layer.scores(n).max()) if foreground else 1.0 for n in range(len(row))]
            sums += sum(w * term for w, term in zip(weights, row, strict=True)) / sum(weights) / 2
        for part, value in zip(PARTS, sums, strict=True):
            found = losses[f"kd_detr_{part}_{group}_0"].double()
            torch.testing.assert_close(found, value, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("layers", ["last", "each"])
def test_places_learn_the_teachers_own_prediction_that_overlaps_them_most(head, layers):
    student, teacher = Proposing(proposing()), Fake(spec(5, 2, 3, head))
    answers = teacher.output.layers
    with torch.no_grad():
        answers[-1].boxes.copy_(student.output.proposals.boxes[:, :5])
        answers[-1].boxes[0, 0, 2:] *= 0.8  # still an IoU of 0.64
        answers[-1].boxes[0, 1, 2:] *= 0.6  # no longer one of 0.5
        answers[-1].logits.copy_(3 * torch.randn(2, 5, answers[-1].logits.shape[-1]))
        answers[-1].logits[1, 0] = torch.tensor([-5.0, -5.0, -5.0, 5.0][: answers[-1].logits.shape[-1]])  # unsure
    method = KDDETR(
        KDDETRConfig(general_points=40, teacher_layers=layers, proposal_targets="assigned"), student.spec, teacher.spec
    )
    losses = method(student.output, teacher.output, targets_of(1, 1), BatchTotals.of((1, 1), 5), seeded(3))
    assert not teacher.asked
    for k, group in enumerate(GROUPS):
        sums, counted = torch.zeros(3, dtype=torch.float64), []
        chosen = answers[-1:] if layers == "last" else answers
        for layer in chosen:
            own, boxes = student.answered[k][-1], student.asked[k].boxes
            last = by_image([answers[-1]])[0]
            for i in range(2):
                sure = [n for n in range(5) if float(last[i].scores(n).max()) >= 0.3]
                weights, rows = [], []
                for box in boxes[i].double():
                    best = max(sure, key=lambda n: float(naive.iou(box, last[i].boxes[n])))
                    near = float(naive.iou(box, last[i].boxes[best])) >= 0.5
                    weights.append(float(last[i].scores(best).max()) if near else 0.0)
                    rows.append(best)
                counted += [weight > 0 for weight in weights]
                taught = layer.at(torch.tensor([rows, rows]))
                terms = naive_points(own, taught, True, 10.0)[i]
                sums += sum(w * term for w, term in zip(weights, terms, strict=True)) / sum(weights) / 2 / len(chosen)
        assert set(counted) == {True, False}
        for part, value in zip(PARTS, sums, strict=True):
            found = losses[f"kd_detr_{part}_{group}_0"].double()
            torch.testing.assert_close(found, value, rtol=2e-4, atol=2e-6)


def test_a_proposal_based_teacher_is_asked_since_its_answers_at_proposals_are_its_own():
    student, teacher = Proposing(proposing()), Proposing(proposing())
    config = KDDETRConfig(general_points=3, proposal_targets="assigned")
    method = KDDETR(config, student.spec, teacher.spec)
    method(student.output, teacher.output, targets_of(1, 1), BatchTotals.of((1, 1), 5), seeded())
    assert len(teacher.asked) == 2


@pytest.mark.parametrize("class_loss", ["softmax_kl", "bce"])
@pytest.mark.parametrize("gate", ["none", "better"])
def test_a_student_that_is_its_teacher_has_no_loss(class_loss, gate):
    fake = Proposing(proposing())

    def best(layer: Predictions) -> Predictions:
        return replace(layer, boxes=layer.boxes_of(layer.scores().argmax(-1)))

    answers = {n: (best(fake.answer(n)[0]),) for n in (6, 11)}
    output = replace(fake.output, layers=answers[6], decode=lambda asked: answers[asked.boxes.shape[1]])
    config = KDDETRConfig(general_points=11, class_loss=class_loss, gate=gate)
    method = KDDETR(config, fake.spec, fake.spec)
    losses = method(output, output, targets_of(2, 1), BatchTotals.of((2, 1), 6), seeded())
    assert len(losses) == 6
    assert all(abs(v) <= (1e-6 if class_loss == "bce" and "class" in n else 0) for n, v in losses.items()), losses


def test_the_gate_judges_the_box_that_is_compared():
    """The teacher's class is another than the student's: what is compared is the student's box of the former."""
    targets = Targets.from_labels([{"class_labels": torch.tensor([0]), "boxes": torch.tensor([OBJECT])}])
    class_boxes = torch.tensor([LESS, OBJECT])[None, None]
    own = Predictions(torch.tensor([[[0.0, 5.0, 0.0]]]), torch.tensor([[OBJECT]]), None, "softmax", None, class_boxes)
    theirs = Predictions(torch.tensor([[[5.0, 0.0]]]), torch.tensor([[OBJECT]]))
    student = replace(Fake(proposing(2), 1).output, decode=lambda _: (own,))
    teacher = replace(Fake(spec(1, 1, 2), 1).output, layers=(theirs,), decode=lambda _: (theirs,))
    found = {}
    for gate in ("none", "better"):
        config = KDDETRConfig(gate=gate, general_points=0, proposal_targets="asked")
        method = KDDETR(config, proposing(2), spec(1, 1, 2))
        found[gate] = method(student, teacher, targets, BatchTotals.of((1,), 1), seeded())
    assert found["none"]["kd_detr_box_specific_0"] > 0.1
    assert all(torch.equal(value, found["none"][name]) for name, value in found["better"].items())


def test_methods_of_one_to_one_queries_refuse_it():
    one_to_one = spec(activation="softmax")
    sentence = (
        "{} cannot use {}, which matches every object with one query: proposing predicts it from every box that "
        "overlaps it; choose --method kd_detr, clockdistill or task_adaptive."
    )
    for sides in ((proposing(), one_to_one), (one_to_one, proposing())):
        pair = f"A {sides[0].family} student and a {sides[1].family} teacher"
        with pytest.raises(ValueError, match=f"^{sentence.format(pair, 'DETRDistill')}$"):
            DETRDistill(DETRDistillConfig(), *sides)
    with pytest.raises(ValueError, match=f"^{sentence.format('A proposing student', 'extra_queries')}$"):
        ExtraQueries(ExtraQueriesConfig(), proposing())
