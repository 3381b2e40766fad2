"""Points of a student that looks at proposals, what it copies there, and steps of a real one and DINO, both ways."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import scipy.stats
import torch
import transformers
from torch import Tensor

from hf_detrkd.adapters import adapter_for
from hf_detrkd.distiller import Distiller
from hf_detrkd.methods import (
    KDDETR,
    METHODS,
    DETRDistill,
    DETRDistillConfig,
    ExtraQueries,
    ExtraQueriesConfig,
    KDDETRConfig,
)
from hf_detrkd.methods.points import PointsConfig, point_losses
from hf_detrkd.methods.regions import best_boxes, nearby_proposals
from hf_detrkd.outputs import BatchTotals, DetectorOutput, DetectorSpec, Predictions, Proposals, Targets
from hf_detrkd.teacher import Teacher
from tests import tiny
from tests.methods import naive
from tests.methods.fakes import Fake, by_image, spec, targets_of


HEADS = ("sigmoid", "softmax")
PARTS = ("class", "box", "giou")
GROUPS = ("specific", "general")


def proposing(classes: int = 3) -> DetectorSpec:
    return replace(spec(6, 1, classes, "softmax", "boxes", family="proposing"), one_to_one=False)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the teacher's best boxes ----------------------------------------------------------------------------------------


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


# --- proposals near them ---------------------------------------------------------------------------------------------

OBJECT = [0.5, 0.5, 0.5, 0.5]
HALF, LESS = [0.5, 0.5, 0.25, 0.5], [0.5, 0.5, 0.2499, 0.5]  # IoU of 1/2, and below
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


# --- KD-DETR of a student with a box for every class -----------------------------------------------------------------


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
    method = KDDETR(KDDETRConfig(general_points=11, foreground_weight=foreground), student.spec, teacher.spec)
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
        method = KDDETR(KDDETRConfig(gate=gate, general_points=0), proposing(2), spec(1, 1, 2))
        found[gate] = method(student, teacher, targets, BatchTotals.of((1,), 1), seeded())
    assert found["none"]["kd_detr_box_specific_0"] > 0.1
    assert all(torch.equal(value, found["none"][name]) for name, value in found["better"].items())


def test_methods_of_one_to_one_queries_refuse_it():
    one_to_one = spec(activation="softmax")
    sentence = (
        "{} cannot do {}, which matches every object with one query: in proposing all boxes that overlap it answer "
        "for it; choose --method kd_detr, clockdistill or task_adaptive."
    )
    for sides in ((proposing(), one_to_one), (one_to_one, proposing())):
        pair = f"A {sides[0].family} student and a {sides[1].family} teacher"
        with pytest.raises(ValueError, match=f"^{sentence.format(pair, 'DETRDistill')}$"):
            DETRDistill(DETRDistillConfig(), *sides)
    with pytest.raises(ValueError, match=f"^{sentence.format('A proposing student', 'extra_queries')}$"):
        ExtraQueries(ExtraQueriesConfig(), proposing())


# --- real detectors --------------------------------------------------------------------------------------------------

RCNN = (
    "backbone.body.",
    "backbone.fpn.",
    "roi_heads.box_head.",
    "roi_heads.box_predictor.cls_score.",
    "roi_heads.box_predictor.bbox_pred.",
)
DINO = ("model.backbone.", "model.input_proj.", "model.encoder.", "model.decoder.")


def detector(family: str) -> transformers.PreTrainedModel:
    """Faster R-CNN as its config makes it, whose scores are not yet all 0 or 1."""
    if family == "faster_rcnn":
        return transformers.AutoModelForObjectDetection.from_config(tiny.config(family))
    return tiny.build(family)


def step(student: str, teacher: str, method: str, padded: bool, **options: Any) -> tuple[dict[str, Any], Any]:
    """A pass in training, and the gradients of the distillation alone by parameter."""
    model, frozen = detector(student).requires_grad_(True), Teacher(detector(teacher), tiny.LABELS)
    if teacher == "dino_detr":
        for parameter in frozen.model.model.decoder.bbox_embed[0].layers[-1].parameters():
            parameter.mul_(0.05)  # it moves boxes a little, and so now and then does better
    before = {name: tensor.clone() for name, tensor in frozen.model.state_dict().items()}
    config = METHODS[method].config_class(**options)
    distiller = Distiller(model, frozen, [METHODS[method](config, adapter_for(model).spec, frozen.spec)]).train()
    images = tiny.batch(96, padded=padded, boxes=(24, 23))
    torch.manual_seed(0)
    output = distiller(**images)
    torch.manual_seed(0)
    losses = distiller.losses(**images)
    names, parameters = zip(*distiller.named_parameters(), strict=True)
    found = torch.autograd.grad(distiller.weighted(losses.distillation), parameters, allow_unused=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.model.state_dict().items())
    return output, {name.removeprefix("student."): g for name, g in zip(names, found, strict=True) if g is not None}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("student", "teacher", "method", "options", "reached"),
    [
        ("faster_rcnn", "dino_detr", "kd_detr", {"general_points": 20}, RCNN),
        ("faster_rcnn", "dino_detr", "task_adaptive", {"class_gate": "foreground"}, RCNN),
        ("dino_detr", "faster_rcnn", "kd_detr", {"general_points": 20}, DINO),
        ("dino_detr", "faster_rcnn", "task_adaptive", {}, DINO[:2]),
    ],
    ids=["boxes by queries", "proposals by queries", "queries by boxes", "features alone"],
)
def test_a_step_is_finite_and_reaches_all_but_the_proposals(student, teacher, method, options, reached, padded):
    output, gradients = step(student, teacher, method, padded, **options)
    parts = output["parts"]
    assert all(value.isfinite() for value in parts.values()), parts
    compared = {name: value for name, value in parts.items() if name.startswith(method) and "pass" not in name}
    groups = ("_specific", "_general") if method == "kd_detr" else ("",)
    kinds = PARTS if method == "kd_detr" else ("features", "class", "box")[: 1 if student == "dino_detr" else 3]
    assert compared.keys() == {f"{method}_{kind}{group}" for kind in kinds for group in groups}
    assert all(value > 0 for value in compared.values()), compared
    for prefix in reached:
        assert any(g.any() for name, g in gradients.items() if name.startswith(prefix)), prefix
    assert all(g.isfinite().all() for g in gradients.values())
    assert not any(g.any() for name, g in gradients.items() if name.startswith("rpn."))


def test_pass_rates_are_logged_and_are_no_losses():
    output, _ = step("faster_rcnn", "dino_detr", "task_adaptive", False)
    parts, rates = output["parts"], {"task_adaptive_class_pass", "task_adaptive_box_pass"}
    assert rates < parts.keys() and not rates & output["terms"].keys()
    assert all(0 <= parts[name] <= 1 and not parts[name].requires_grad for name in rates)
    distances = [parts[f"task_adaptive_{part}"] for part in ("features", "class", "box")]
    torch.testing.assert_close(parts["distillation_loss"], sum(distances))
    torch.testing.assert_close(output["loss"].detach(), parts["task_loss"] + parts["distillation_loss"])


@pytest.mark.parametrize(
    ("method", "options"),
    [("kd_detr", {"general_points": 20}), ("task_adaptive", {"class_gate": "foreground"}), ("task_adaptive", {})],
    ids=["points", "proposals", "better proposals"],
)
def test_a_real_student_that_is_its_teacher_has_no_loss(method, options):
    model = transformers.AutoModelForObjectDetection.from_config(tiny.config("faster_rcnn", frozen_batch_norm=True))
    frozen, config = Teacher(copy.deepcopy(model), tiny.LABELS), METHODS[method].config_class(**options)
    distiller = Distiller(model, frozen, [METHODS[method](config, frozen.spec, frozen.spec)]).train()
    losses = distiller.losses(**tiny.batch(96, padded=True, boxes=(6, 5))).distillation
    # Proposals pass from pixels to [0, 1] and back before the teacher is asked.
    exact = {name for name in losses if method == "kd_detr" or "features" in name}
    assert exact and all(abs(value) <= (0 if name in exact else 1e-5) for name, value in losses.items()), losses
