"""DETRDistill: its mathematics against naive loops on random answers, and real tiny detectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_detrkd.adapters import DetectorAdapter, adapter_for, spec_for
from hf_detrkd.methods import DETRDistill, DETRDistillConfig
from hf_detrkd.outputs import DetectorOutput, FeatureMap
from hf_detrkd.targets import BatchTotals, Targets
from hf_detrkd.teacher import Teacher
from tests import tiny
from tests.methods import naive
from tests.methods.fakes import HEADS, Fake, by_image, spec, targets_of, truth_of


VARIANTS = ("paper", "released")
ONLY_LOGITS = {"feature_weight": 0.0, "assignment_weight": 0.0}
ONLY_FEATURE = {"logits_weight": 0.0, "assignment_weight": 0.0}
ONLY_ASSIGNMENT = {"logits_weight": 0.0, "feature_weight": 0.0}
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


def losses_of(student: Fake, teacher: Fake, targets: Targets, **options: Any) -> dict[str, Tensor]:
    method = DETRDistill(DETRDistillConfig(**options), student.spec, teacher.spec)
    return compare(method, student.output, teacher.output, targets)


def compare(method: DETRDistill, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict:
    totals = BatchTotals.of(targets.counts, student.layers[0].boxes.shape[1])
    return method(student, teacher, targets, totals, torch.Generator())


def assert_equal(losses: dict[str, Tensor], expected: dict[tuple[str, int], Tensor], name: str) -> None:
    assert losses.keys() == {f"detrdistill_{name}_{part}_{layer}" for part, layer in expected}
    for (part, layer), value in expected.items():
        found = losses[f"detrdistill_{name}_{part}_{layer}"].double()
        wanted = torch.as_tensor(value, dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, p=(part, layer): f"{p}: {m}")


# --- logits ----------------------------------------------------------------------------------------------------------


@grid
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("student_head", HEADS)
@pytest.mark.parametrize("teacher_head", HEADS)
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


# --- feature ---------------------------------------------------------------------------------------------------------


def feature_oracle(
    own: Tensor, wanted: FeatureMap, teacher: Fake, targets: Targets, variant: str, gamma: float = 0.5
) -> Tensor:
    padding = torch.zeros_like(wanted.values[:, 0]).bool() if wanted.padding is None else wanted.padding
    maps = own.detach().double(), wanted.values.double()
    layers = by_image(teacher.output.layers)
    return naive.detrdistill_feature(*maps, ~padding, layers, truth_of(targets), gamma if variant == "paper" else None)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("counts", [(2, 1), (0, 3), (0, 0)])
def test_features_equal_the_naive_computation(variant, head, padded, counts):
    for queries, classes, gamma in ((4, 3, 0.5), (12, 10, 0.2)):  # fewer and more than 100 pairs
        batch, maps = len(counts), [(3, 4), (2, 2)]
        student = Fake(spec(neck=(8, 8)), batch, trains=True, maps=maps, padded=padded)
        wanted = spec(queries, 2, classes, head, neck=(8, 8))
        teacher = Fake(wanted, batch, maps=maps, padded=padded)
        targets = targets_of(*counts)
        losses = losses_of(student, teacher, targets, variant=variant, gamma=gamma, **ONLY_FEATURE)
        assert losses.keys() == {"detrdistill_feature_0", "detrdistill_feature_1"}
        for level in range(2):
            own, goal = student.output.features["neck"][level], teacher.output.features["neck"][level]
            expected = feature_oracle(own.values, goal, teacher, targets, variant, gamma)
            torch.testing.assert_close(losses[f"detrdistill_feature_{level}"].double(), expected, rtol=1e-4, atol=1e-6)


def test_a_map_of_another_width_and_stride_is_projected_and_resized():
    student = Fake(spec(width=6), trains=True, maps=[(8, 10)])
    teacher, targets = Fake(spec(width=8), maps=[(4, 5)]), targets_of(2, 1)
    method = DETRDistill(DETRDistillConfig(**ONLY_FEATURE), student.spec, teacher.spec)
    (losses,) = compare(method, student.output, teacher.output, targets).values()
    (projection,), own = method.projections, student.output.features["neck"][0].values
    projected = torch.einsum("oc,bchw->bohw", projection.weight[..., 0, 0], own) + projection.bias[:, None, None]
    halved = F.avg_pool2d(projected, 2)  # what bilinear sampling between four cells is
    wanted = teacher.output.features["neck"][0]
    torch.testing.assert_close(losses.double(), feature_oracle(halved, wanted, teacher, targets, "paper"))
    assert all(g.any() for g in torch.autograd.grad(losses, [own, *method.parameters()]))


def test_only_maps_of_another_width_are_projected():
    config = DETRDistillConfig(**ONLY_FEATURE)
    projections = DETRDistill(config, spec(neck=(6, 8, 4)), spec(neck=(8, 8))).projections
    assert [type(p) for p in projections] == [nn.Conv2d, nn.Identity, nn.Conv2d]
    assert [p.weight.shape for p in projections if isinstance(p, nn.Conv2d)] == [(8, 6, 1, 1), (8, 4, 1, 1)]


def test_each_level_learns_from_the_level_of_the_nearest_stride():
    student = Fake(spec(neck=(8,) * 3), trains=True, maps=[(16, 20), (8, 10), (2, 3)])
    teacher, targets = Fake(spec(neck=(8,) * 2), maps=[(7, 10), (4, 5)]), targets_of(2, 1)
    losses = losses_of(student, teacher, targets, **ONLY_FEATURE)
    for level, nearest in enumerate((0, 0, 1)):
        own, goal = student.output.features["neck"][level].values, teacher.output.features["neck"][nearest]
        resized = F.interpolate(own, goal.values.shape[-2:], mode="bilinear")
        expected = feature_oracle(resized, goal, teacher, targets, "paper")
        torch.testing.assert_close(losses[f"detrdistill_feature_{level}"].double(), expected)


def test_the_other_place_of_features_can_be_chosen():
    student, teacher, targets = Fake(spec(), trains=True), Fake(spec()), targets_of(2, 1)
    for place in ("neck", "encoder"):
        losses = losses_of(student, teacher, targets, feature_level=place, **ONLY_FEATURE)
        own = student.output.features[place][0].values
        assert torch.autograd.grad(losses["detrdistill_feature_0"], own)[0].any()
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(losses["detrdistill_feature_0"], student.output.features["neck"][0].values)


def test_what_stands_in_padding_changes_nothing():
    student, teacher = (Fake(spec(), trains=trains, padded=True) for trains in (True, False))
    targets = targets_of(2, 1)
    before = losses_of(student, teacher, targets, **ONLY_FEATURE)["detrdistill_feature_0"]
    own = student.output.features["neck"][0]
    gradient = torch.autograd.grad(before, own.values)[0]
    assert not gradient.movedim(1, -1)[own.padding].any() and gradient.movedim(1, -1)[~own.padding].all()
    for fake in (student, teacher):
        level = fake.output.features["neck"][0]
        level.values.data += 100 * level.padding[:, None]
    after = losses_of(student, teacher, targets, **ONLY_FEATURE)["detrdistill_feature_0"]
    torch.testing.assert_close(after, before)


def test_an_image_weighs_the_same_however_much_its_neighbours_pad_it():
    student, teacher = Fake(spec(), 1, trains=True), Fake(spec(), 1)
    targets = targets_of(2)
    alone = losses_of(student, teacher, targets, **ONLY_FEATURE)["detrdistill_feature_0"]
    for fake in (student, teacher):
        values = fake.output.features["neck"][0].values
        padding = F.pad(torch.zeros_like(values[:, 0]), (0, 3, 0, 2), value=1.0).bool()
        fake.output.features["neck"] = (FeatureMap(F.pad(values, (0, 3, 0, 2), value=5.0), padding),)
    padded = losses_of(student, teacher, targets, **ONLY_FEATURE)["detrdistill_feature_0"]
    torch.testing.assert_close(padded, alone)


# --- assignment ------------------------------------------------------------------------------------------------------


@countable
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("teacher_head", HEADS)
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


# --- options ---------------------------------------------------------------------------------------------------------


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
        ({"logits_weight": -1.0}, r"weights must be at least 0 and one of them above, got \(-1.0, 1.0, 1.0\)"),
        (ONLY_LOGITS | {"logits_weight": 0.0}, r"at least 0 and one of them above, got \(0.0, 0.0, 0.0\)"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DETRDistillConfig(**options)


@pytest.mark.parametrize("teacher", ["detr", "table-transformer"])
@pytest.mark.parametrize("student", tiny.FAMILIES)
def test_queries_of_a_detr_teacher_of_another_width_are_refused_and_the_other_losses_not(student, teacher):
    specs = spec_for(tiny.config(student)), spec_for(tiny.config(teacher, 64))
    message = (
        rf"A {student} student \(32 wide\) cannot be asked the queries of a {teacher} teacher \(64 wide\): set "
        "assignment_weight to 0, or choose a teacher of the same family and width"
    )
    with pytest.raises(ValueError, match=message):
        DETRDistill(DETRDistillConfig(), *specs)
    DETRDistill(DETRDistillConfig(assignment_weight=0.0), *specs)


def test_maps_that_are_not_as_wide_as_the_teacher_s_states_are_refused():
    wide = replace(spec(), features={"neck": (8, 12), "encoder": (8, 8)})
    message = (
        r"teacher's decoder states \(8 wide\) with its neck maps \(\[8, 12\] wide\): set feature_level to the other"
    )
    with pytest.raises(ValueError, match=message):
        DETRDistill(DETRDistillConfig(), spec(), wide)
    DETRDistill(DETRDistillConfig(feature_level="encoder"), spec(), wide)
    DETRDistill(DETRDistillConfig(feature_weight=0.0), spec(), wide)


# --- real detectors --------------------------------------------------------------------------------------------------


def distil(
    student: DetectorAdapter, teacher: Teacher, boxes: Sequence[int] = (2, 0), padded: bool = False, **options: Any
) -> tuple[DETRDistill, dict[str, Tensor]]:
    inputs = tiny.batch(64, boxes=boxes, padded=padded)
    output, _ = student(inputs["pixel_values"], inputs.get("pixel_mask"))
    seen = teacher(inputs["pixel_values"], inputs.get("pixel_mask"))
    method = DETRDistill(DETRDistillConfig(**options), student.spec, teacher.spec)
    return method, compare(method, output, seen, Targets.from_labels(inputs["labels"]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_student_that_is_its_teacher_has_no_loss_in_answers_and_features(build, askable, variant):
    family = askable
    student, teacher = adapter_for(build(family)), Teacher(build(family), tiny.LABELS)
    _, losses = distil(student, teacher, variant=variant)
    compared = {name: value for name, value in losses.items() if "assignment" not in name}
    levels, terms = len(student.spec.features["neck"]), 5 if variant == "paper" else 3
    assert len(compared) == terms * tiny.NUM_LAYERS + levels
    assert all(abs(value) < 1e-6 for value in compared.values()), compared
    assert all(value > 1e-3 for name, value in losses.items() if name not in compared)


@pytest.mark.parametrize("place", ["neck", "encoder"])
def test_each_loss_reaches_the_backbone_and_the_projections(build, askable, place):
    family = askable
    model = build(family).requires_grad_(True)
    student, width = adapter_for(model), 32 if family in ("detr", "table-transformer") else 64
    teacher = Teacher(tiny.build(family, width, seed=1), tiny.LABELS)
    method, losses = distil(student, teacher, feature_level=place, padded=student.uses_pixel_mask)
    first = next(p for n, p in student.backbone_parameters() if n.endswith("weight") and p.ndim == 4)
    for name in method.weights:
        terms = torch.stack([value for key, value in losses.items() if key.startswith(name)])
        assert torch.autograd.grad(terms.sum(), first, retain_graph=True)[0].any(), name
    assert (width == 64) == any(True for _ in method.parameters())
    feature = sum(value for name, value in losses.items() if "feature" in name)
    assert all(g.any() for g in torch.autograd.grad(feature, list(method.parameters()))) if width == 64 else True


@pytest.mark.parametrize(
    ("teacher_name", "student_name"),
    [
        ("rt_detr", "deformable_detr/two_stage"),
        ("deformable_detr/two_stage", "rt_detr"),
        ("deformable_detr/two_stage", "deformable_detr/plain"),
        ("deformable_detr/plain", "deformable_detr/refine"),
    ],
)
def test_unlike_detectors_distil(build: Callable, teacher_name, student_name):
    teacher = Teacher(tiny.build(teacher_name, 64, seed=1, decoder_layers=2, num_queries=9), tiny.LABELS)
    _, losses = distil(adapter_for(build(student_name).requires_grad_(True)), teacher)
    assert all(value.isfinite() and value >= 0 for value in losses.values())


def test_a_softmax_student_learns_from_a_sigmoid_teacher_by_answers_and_features(build):
    teacher = Teacher(tiny.build("rt_detr", 64, seed=1), tiny.LABELS)
    _, losses = distil(adapter_for(build("detr")), teacher, assignment_weight=0.0)
    assert all(value.isfinite() and value >= 0 for value in losses.values())
