"""CLoCKDistill: its mathematics against naive loops on random answers and maps, and real tiny detectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_detrkd.adapters import ADAPTERS, DetectorAdapter, adapter_for, spec_for
from hf_detrkd.methods import CLoCKDistill, CLoCKDistillConfig
from hf_detrkd.methods.clockdistill import location_scales, target_queries
from hf_detrkd.outputs import BatchTotals, DetectorOutput, FeatureMap, Targets
from hf_detrkd.teacher import Teacher
from tests import tiny
from tests.methods import naive
from tests.methods.fakes import Fake, by_image, spec, targets_of


HEADS = ("sigmoid", "softmax")
ONLY_MEMORY = {"target_queries_weight": 0.0}
ONLY_QUERIES = {"memory_weight": 0.0}
PARTS = ("class", "box", "giou")
PLACELESS = ("detr", "table-transformer", "yolos")
PLACED = tuple(name for name in tiny.FAMILIES if name not in PLACELESS)
MASKING = tuple(name for name in tiny.FAMILIES if ADAPTERS[tiny.config(name).model_type].uses_pixel_mask)
# layers of student and teacher, classes, boxes of each image
SIZES = {
    "equal": (2, 2, 3, (2, 1)),
    "6 layers teach 3": (3, 6, 2, (3,)),
    "2 layers teach 3": (3, 2, 5, (1, 4, 2)),
    "3 layers teach 2": (2, 3, 1, (2, 2)),
    "one of everything": (1, 1, 2, (1,)),
    "an image without boxes": (2, 2, 3, (0, 3, 1)),
    "no boxes at all": (2, 1, 3, (0, 0)),
}
grid = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def compare(method: CLoCKDistill, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict:
    return method(student, teacher, targets, BatchTotals.of(targets.counts, 100), torch.Generator())


def losses_of(student: Fake, teacher: Fake, targets: Targets, **options: Any) -> dict[str, Tensor]:
    method = CLoCKDistill(CLoCKDistillConfig(**options), student.spec, teacher.spec)
    return compare(method, student.output, teacher.output, targets)


def truth_of(targets: Targets) -> naive.Truth:
    return [(label["class_labels"].tolist(), label["boxes"].double()) for label in targets.to_labels()]


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


# --- answers to the target queries -----------------------------------------------------------------------------------


def fakes(sizes: tuple, student_head: str = "sigmoid", teacher_head: str = "sigmoid") -> tuple[Fake, Fake, Targets]:
    student_layers, teacher_layers, classes, counts = sizes
    student = spec(5, student_layers, classes, student_head)
    teacher = spec(6, teacher_layers, classes, teacher_head)
    batch = len(counts)
    return Fake(student, batch, trains=True), Fake(teacher, batch), targets_of(*counts, num_classes=classes)


@grid
@pytest.mark.parametrize("student_head", HEADS)
@pytest.mark.parametrize("teacher_head", HEADS)
@pytest.mark.parametrize("class_loss", ["softmax_kl", "bce"])
def test_answers_equal_the_naive_computation(sizes, student_head, teacher_head, class_loss):
    for temperature in (10.0, 2.5):
        student, teacher, targets = fakes(sizes, student_head, teacher_head)
        options = {"class_loss": class_loss, "temperature": temperature}
        losses = losses_of(student, teacher, targets, **options, **ONLY_QUERIES)
        answers = by_image(student.answered[0]), by_image(teacher.answered[0])
        # A softmax over the one class of a sigmoid head is constant: there the class term is that of bce.
        tempered = class_loss == "softmax_kl" and (sizes[2] > 1 or student_head == "softmax")
        expected = naive.clockdistill_queries(*answers, list(targets.counts), tempered, temperature)
        assert losses.keys() == {f"clockdistill_{part}_{layer}" for part, layer in expected}
        for (part, layer), value in expected.items():
            found = losses[f"clockdistill_{part}_{layer}"].double()
            torch.testing.assert_close(found, torch.as_tensor(value), rtol=2e-4, atol=2e-6)
            assert (found > 0) == (sum(targets.counts) > 0)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0])
def test_the_class_term_has_the_gradient_of_the_teacher_first_divergence(head, temperature):
    """`T^2 KL(teacher || student)` has the gradient `T (p_student - p_teacher)`; the authors' prototype swaps the two,
    and the detached side has none."""
    student, teacher, targets = fakes((2, 2, 4, (3, 1)), head, head)
    losses = losses_of(student, teacher, targets, temperature=temperature, **ONLY_QUERIES)
    answered, wanted = student.answered[0][1], teacher.answered[0][1]
    (gradient,) = torch.autograd.grad(losses["clockdistill_class_1"], answered.logits)
    weight = wanted.scores().amax(-1) * targets.valid
    weight = weight / weight.sum(-1, keepdim=True) / 2
    apart = (answered.logits / temperature).softmax(-1) - (wanted.logits / temperature).softmax(-1)
    torch.testing.assert_close(gradient, weight[..., None] * temperature * apart, atol=1e-6, rtol=1e-4)
    assert (gradient[targets.valid].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("class_loss", ["softmax_kl", "bce"])
def test_answers_to_rows_of_padding_count_nowhere(class_loss):
    student, teacher, targets = fakes((2, 3, 4, (4, 1, 0)))
    answers = student.answer(4), teacher.answer(4)
    padding = ~targets.valid

    def losses() -> dict[str, Tensor]:
        outputs = [
            replace(fake.output, decode=lambda _, a=a: a) for fake, a in zip((student, teacher), answers, strict=True)
        ]
        config = CLoCKDistillConfig(class_loss=class_loss, **ONLY_QUERIES)
        return compare(CLoCKDistill(config, student.spec, teacher.spec), *outputs, targets)

    before = losses()
    for layer in answers[0]:
        for values in torch.autograd.grad(total(before), (layer.logits, layer.boxes), retain_graph=True):
            assert not values[padding].any() and values[targets.valid].any(-1).all()
    for side in answers:
        for layer in side:
            layer.logits.data[padding] = 50 * torch.randn(int(padding.sum()), 4)
            layer.boxes.data[padding] = tiny.random_boxes(int(padding.sum()))
    after = losses()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("class_loss", "least"), [("softmax_kl", 0.0), ("bce", 1e-6)])
def test_equal_answers_and_maps_have_no_loss(head, class_loss, least):
    for padded, gate in itertools.product((False, True), ("none", "better")):
        teacher, targets = Fake(spec(activation=head, num_layers=3), padded=padded), targets_of(4, 2)
        answers = teacher.answer(4)
        output = replace(teacher.output, decode=lambda _, answers=answers: answers)
        config = CLoCKDistillConfig(class_loss=class_loss, gate=gate)
        losses = compare(CLoCKDistill(config, teacher.spec, teacher.spec), output, output, targets)
        assert len(losses) == 3 * 3 + (2 if gate == "none" else 1)
        assert all(abs(value) <= least for value in losses.values()), losses


def test_both_models_are_asked_at_every_box_from_zero_content():
    student, teacher = Fake(spec(width=16), 3), Fake(spec(), 3)
    targets = targets_of(2, 0, 3)
    losses_of(student, teacher, targets)
    for fake in (student, teacher):
        (asked,) = fake.asked
        assert asked.fields == {"boxes", "content", "groups"}
        assert torch.equal(asked.boxes, targets.boxes) and not asked.boxes.requires_grad
        assert torch.equal(asked.content, torch.zeros(3, 3, fake.spec.width))
        assert torch.equal(asked.groups == 0, targets.valid)


@pytest.mark.parametrize("width", [8, 16])
def test_own_content_is_left_to_each_model(width):
    student, teacher = Fake(spec(width=width)), Fake(spec())
    losses_of(student, teacher, targets_of(2, 1), content="own")
    assert all(queries.fields == {"boxes", "groups"} for queries in [*student.asked, *teacher.asked])


def test_a_batch_without_boxes_asks_one_row_of_padding():
    student, teacher, targets = fakes(SIZES["no boxes at all"])
    losses_of(student, teacher, targets)
    assert [queries.size for queries in [*student.asked, *teacher.asked]] == [1, 1]
    assert torch.equal(student.asked[0].groups, torch.ones(2, 1, dtype=torch.long))


# --- memory ----------------------------------------------------------------------------------------------------------


def flags(height: int, width: int, real: tuple[int, int]) -> Tensor:
    padding = torch.ones(1, height, width, dtype=torch.bool)
    padding[:, : real[0], : real[1]] = False
    return padding


def scales(boxes: list[list[float]], padding: Tensor) -> tuple[Tensor, Tensor]:
    targets = Targets.from_labels(
        [{"class_labels": torch.zeros(len(boxes), dtype=torch.long), "boxes": torch.tensor(boxes).view(-1, 4)}]
    ).at_least_one_row()
    goal = FeatureMap(torch.zeros(1, 2, *padding.shape[1:]), padding if padding.any() else None)
    foreground, background = location_scales(targets, targets.valid, goal)
    return foreground[0], background[0]


def test_a_cell_counts_as_a_part_of_the_smallest_box_that_holds_it():
    large, small, other = [0.375, 0.5, 0.75, 1.0], [0.5, 0.5, 0.5, 0.5], [0.9, 0.125, 0.1, 0.2]
    foreground, background = scales([large, small, other], flags(4, 4, (4, 4)))
    a, b = 1 / 12, 1 / 4
    assert torch.equal(foreground, torch.tensor([[a, a, a, 1], [a, b, b, 0], [a, b, b, 0], [a, a, a, 0]]))
    c = 1 / 3
    assert torch.equal(background, torch.tensor([[0, 0, 0, 0], [0, 0, 0, c], [0, 0, 0, c], [0, 0, 0, c]]))


def test_boxes_and_background_lie_in_the_part_that_is_not_padding():
    foreground, background = scales([[0.75, 0.5, 0.5, 0.5]], flags(3, 6, (2, 4)))
    a, c = 1 / 4, 1 / 4
    assert torch.equal(foreground, torch.tensor([[0, 0, a, a, 0, 0], [0, 0, a, a, 0, 0], [0] * 6]))
    assert torch.equal(background, torch.tensor([[c, c, 0, 0, 0, 0], [c, c, 0, 0, 0, 0], [0] * 6]))


@pytest.mark.parametrize(
    ("box", "cells"),
    [
        ([0.5, 0.6, 0.001, 0.001], {(2, 2)}),
        ([0.1, 0.3, 1e-9, 1e-9], {(1, 0)}),
        ([0.4, 0.5, 0.0, 0.0], {(2, 2)}),
        ([1.0, 1.0, 0.0, 0.0], {(3, 4)}),
        ([0.0, 0.0, 0.1, 0.1], {(0, 0)}),
        ([1.0, 0.5, 0.2, 0.1], {(1, 4), (2, 4)}),
        ([0.6, 0.25, 0.4, 0.5], {(0, 2), (0, 3), (1, 2), (1, 3)}),
    ],
    ids=[
        "in one cell",
        "of no size",
        "on a corner",
        "at the last corner",
        "over the edge",
        "on the border",
        "on cells",
    ],
)
def test_a_box_covers_the_cells_that_it_touches_and_at_least_one(box, cells):
    foreground, _ = scales([box], flags(4, 5, (4, 5)))
    assert set(map(tuple, foreground.nonzero().tolist())) == cells
    torch.testing.assert_close(foreground.sum(), torch.tensor(1.0))
    assert set(naive.cells_of(torch.tensor(box), 4, 5)) == cells


def test_a_box_of_whole_cells_touches_no_other_whatever_its_numbers_round_to():
    for first in range(25):
        for last in range(first + 1, 26):
            box = [(first + last) / 50, (first + last) / 50, (last - first) / 25, (last - first) / 25]
            foreground, _ = scales([box], flags(25, 25, (25, 25)))
            cells = set(range(first, last))
            for side in foreground.nonzero().T.tolist():
                assert set(side) == cells


def test_background_is_nothing_where_a_box_is_the_whole_image():
    foreground, background = scales([[0.5, 0.5, 1.0, 1.0]], flags(4, 5, (3, 4)))
    assert not background.any() and torch.equal(foreground[:3, :4], torch.full((3, 4), 1 / 12))


def random_targets(counts: Sequence[int]) -> Targets:
    """Boxes of every kind: of no size, over the edge, one within another."""
    targets = targets_of(*counts)
    special = [[0.5, 0.5, 0.9, 0.8], [0.5, 0.45, 0.3, 0.3], [0.97, 0.6, 0.2, 0.3], [0.31, 0.29, 1e-3, 1e-3]]
    for image, count in enumerate(counts):
        for row, box in enumerate(special[: max(count - 1, 0)]):
            targets.boxes[image, row] = torch.tensor(box)
    return targets


def memory_oracle(
    projected: Tensor, goal: FeatureMap, targets: Targets, student: FeatureMap | None = None
) -> tuple[Tensor, Tensor]:
    """`student` is its map before the projection, where it is padded otherwise than the teacher's."""
    real = torch.ones_like(goal.values[:, 0]).bool() if goal.padding is None else ~goal.padding
    own = real if real.shape == projected[:, 0].shape else torch.ones_like(projected[:, 0]).bool()
    if student is not None:
        own = torch.ones_like(projected[:, 0]).bool() if student.padding is None else ~student.padding
    maps = projected.detach().double(), goal.values.double()
    return naive.clockdistill_memory(*maps, real, truth_of(targets), own)


def assert_memory(losses: dict[str, Tensor], level: int, expected: tuple[Tensor, Tensor]) -> None:
    """The oracle weighs with alpha and beta."""
    weights = CLoCKDistill(CLoCKDistillConfig(), spec(), spec()).weights
    for part, value in zip(("foreground", "background"), expected, strict=True):
        found = losses[f"clockdistill_{part}_{level}"].double() * weights[f"clockdistill_{part}"]
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-12, msg=lambda m, p=part: f"{p}: {m}")


@pytest.mark.parametrize(
    ("maps", "padded"),
    [*itertools.product([[(4, 5)], [(8, 12), (4, 6), (2, 3)], [(7, 3), (9, 16)]], [False, True]), ([(1, 1)], False)],
    ids=str,
)
@pytest.mark.parametrize("counts", [(2, 1), (5, 0, 3), (0, 0), (1,)], ids=str)
def test_memory_equals_the_naive_computation(maps, padded, counts):
    maps_of = spec(neck=(8,) * len(maps))
    student, teacher = (Fake(maps_of, len(counts), trains=t, maps=maps, padded=padded) for t in (True, False))
    targets = random_targets(counts)
    losses = losses_of(student, teacher, targets, **ONLY_MEMORY)
    assert len(losses) == 2 * len(maps)
    for level in range(len(maps)):
        own, goal = student.output.features["encoder"][level], teacher.output.features["encoder"][level]
        assert_memory(losses, level, memory_oracle(own.values, goal, targets))


@pytest.mark.parametrize("student_map", [(8, 10), (2, 3), (3, 7), (4, 5)], ids=str)
@pytest.mark.parametrize("padded", [(False, False), (True, True), (True, False), (False, True)], ids=str)
def test_a_map_of_another_width_and_grid_is_projected_and_resized(student_map, padded):
    student = Fake(spec(width=6), trains=True, maps=[student_map], padded=padded[0])
    teacher, targets = Fake(spec(width=8), padded=padded[1]), random_targets((3, 1))
    method = CLoCKDistill(CLoCKDistillConfig(**ONLY_MEMORY), student.spec, teacher.spec)
    losses = compare(method, student.output, teacher.output, targets)
    (projection,), own = method.projections, student.output.features["encoder"][0].values
    before = student.output.features["encoder"][0]
    projected = torch.einsum("oc,bchw->bohw", projection.weight[..., 0, 0], own) + projection.bias[:, None, None]
    assert_memory(losses, 0, memory_oracle(projected, teacher.output.features["encoder"][0], targets, before))
    assert all(g.any() for g in torch.autograd.grad(total(losses), [own, *method.parameters()]))


def test_only_maps_of_another_width_are_projected():
    projections = CLoCKDistill(CLoCKDistillConfig(), spec(neck=(6, 8, 4)), spec(neck=(8, 8))).projections
    assert [type(p) for p in projections] == [nn.Conv2d, nn.Identity, nn.Conv2d]
    assert not list(CLoCKDistill(CLoCKDistillConfig(**ONLY_QUERIES), spec(width=6), spec()).parameters())


def test_each_level_learns_from_the_level_of_the_nearest_stride():
    student = Fake(spec(neck=(8,) * 3), trains=True, maps=[(16, 20), (8, 10), (2, 3)])
    teacher, targets = Fake(spec(neck=(8,) * 2), maps=[(7, 10), (4, 5)]), targets_of(2, 1)
    losses = losses_of(student, teacher, targets, **ONLY_MEMORY)
    for level, nearest in enumerate((0, 0, 1)):
        own, goal = student.output.features["encoder"][level].values, teacher.output.features["encoder"][nearest]
        assert_memory(losses, level, memory_oracle(own, goal, targets))


def test_memory_is_the_encoder_s_and_not_the_neck_s():
    student, teacher = Fake(spec(), trains=True), Fake(spec())
    losses = losses_of(student, teacher, targets_of(2, 1), **ONLY_MEMORY)
    own = {place: student.output.features[place][0].values for place in ("encoder", "neck")}
    found = torch.autograd.grad(total(losses), list(own.values()), allow_unused=True)
    assert found[0].any() and found[1] is None


def test_what_stands_in_padding_changes_nothing():
    student, teacher = (Fake(spec(), trains=trains, padded=True) for trains in (True, False))
    targets = targets_of(3, 1)
    before = losses_of(student, teacher, targets, **ONLY_MEMORY)
    own = student.output.features["encoder"][0]
    gradient = torch.autograd.grad(total(before), own.values)[0].movedim(1, -1)
    assert not gradient[own.padding].any() and gradient[~own.padding].all()
    for fake in (student, teacher):
        level = fake.output.features["encoder"][0]
        level.values.data += 1e4 * torch.randn_like(level.values) * level.padding[:, None]
    targets.boxes[~targets.valid] = float("nan")
    after = losses_of(student, teacher, targets, **ONLY_MEMORY)
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_an_image_weighs_the_same_however_much_its_neighbours_pad_it():
    student, teacher, targets = Fake(spec(), 1, trains=True), Fake(spec(), 1), targets_of(2)
    alone = losses_of(student, teacher, targets, **ONLY_MEMORY)
    for fake in (student, teacher):
        values = fake.output.features["encoder"][0].values
        padding = F.pad(torch.zeros_like(values[:, 0]), (0, 3, 0, 2), value=1.0).bool()
        fake.output.features["encoder"] = (FeatureMap(F.pad(values, (0, 3, 0, 2), value=5.0), padding),)
    padded = losses_of(student, teacher, targets, **ONLY_MEMORY)
    for name, value in alone.items():
        torch.testing.assert_close(padded[name], value)


def test_an_image_without_boxes_is_background_and_nothing_else():
    student, teacher = Fake(spec(), 1, trains=True), Fake(spec(), 1)
    losses = losses_of(student, teacher, targets_of(0), **ONLY_MEMORY)
    own, goal = (fake.output.features["encoder"][0].values for fake in (student, teacher))
    assert losses["clockdistill_foreground_0"] == 0.0
    torch.testing.assert_close(losses["clockdistill_background_0"], (own - goal).square().sum() / 20)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["memory", "target_queries"])
def test_a_weight_of_zero_switches_a_loss_off_and_changes_no_other(part):
    student, teacher, targets = fakes((2, 3, 3, (2, 1)))
    found = []
    for options in ({}, {f"{part}_weight": 0.0}):
        torch.manual_seed(0)
        found.append(losses_of(student, teacher, targets, **options))
    everything, rest = found
    memory = {"clockdistill_foreground_0", "clockdistill_background_0"}
    assert memory < everything.keys()
    assert rest.keys() == (everything.keys() - memory if part == "memory" else memory)
    assert all(torch.equal(value, everything[name]) for name, value in rest.items())
    assert len(student.asked) == len(teacher.asked) == (2 if part == "memory" else 1)


def test_weights_are_the_config_s_times_those_of_the_formula():
    config = CLoCKDistillConfig(memory_weight=3, target_queries_weight=4, foreground_alpha=2, background_beta=0.5)
    found = [CLoCKDistill(c, spec(), spec()).weights for c in (CLoCKDistillConfig(), config)]
    names = [f"clockdistill_{part}" for part in ("foreground", "background", *PARTS)]
    assert found == [dict(zip(names, values, strict=True)) for values in ((5e-5, 1e-7, 1, 5, 2), (6, 1.5, 4, 20, 8))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"memory_weight": -1.0},
            r"CLoCKDistill's weights must be at least 0, and memory_weight or target_queries_weight above, got "
            r"\(-1.0, 1.0\), alpha 5e-05 and beta 1e-07\.",
        ),
        ({"target_queries_weight": -1.0}, r"got \(1.0, -1.0\), alpha"),
        ({"memory_weight": 0.0, "target_queries_weight": 0.0}, r"target_queries_weight above, got \(0.0, 0.0\)"),
        ({"foreground_alpha": -2.0}, "alpha -2.0 and beta 1e-07"),
        ({"background_beta": -3.0}, "alpha 5e-05 and beta -3.0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CLoCKDistillConfig(**options)


@pytest.mark.parametrize("first", PLACELESS)
@pytest.mark.parametrize("second", tiny.FAMILIES)
def test_a_pair_without_a_shared_place_learns_the_memory_alone(first, second):
    for student, teacher in ((first, second), (second, first)):
        specs = spec_for(tiny.config(student)), spec_for(tiny.config(teacher))
        message = (
            f"CLoCKDistill asks both decoders at the objects' boxes, but a {teacher} teacher and a {student} student "
            "cannot both be asked at a place: set target_queries_weight to 0, or choose two families with boxes or "
            "reference points"
        )
        with pytest.raises(ValueError, match=message):
            CLoCKDistill(CLoCKDistillConfig(), *specs)
        CLoCKDistill(CLoCKDistillConfig(**ONLY_MEMORY), *specs)


@pytest.mark.parametrize("student", PLACED)
@pytest.mark.parametrize("teacher", PLACED)
def test_every_pair_of_families_with_places_is_accepted(student, teacher):
    CLoCKDistill(CLoCKDistillConfig(), spec_for(tiny.config(student)), spec_for(tiny.config(teacher, 64)))


# --- real detectors --------------------------------------------------------------------------------------------------


def possible(name: str) -> dict[str, Any]:
    """Options that two detectors of a family allow."""
    return ONLY_MEMORY if name in PLACELESS else {}


def other(name: str, width: int = 32) -> Teacher:
    """A teacher of other weights than the student's."""
    return Teacher(tiny.build(name, width, seed=1), tiny.LABELS)


def distil(
    student: DetectorAdapter, teacher: Teacher, inputs: dict[str, Any], **options: Any
) -> tuple[CLoCKDistill, dict[str, Tensor]]:
    method = CLoCKDistill(CLoCKDistillConfig(**options), student.spec, teacher.spec)
    images = inputs["pixel_values"], inputs.get("pixel_mask")
    output = student(*images)[0]
    return method, compare(method, output, teacher(*images), Targets.from_labels(inputs["labels"]))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("options", [{"content": "zero"}, {"content": "own", "class_loss": "bce"}], ids=str)
def test_a_student_that_is_its_teacher_has_no_loss(build, name, options):
    student, teacher = adapter_for(build(name).requires_grad_(True)), Teacher(build(name), tiny.LABELS)
    inputs = tiny.batch(64, boxes=(3, 1), padded=name in MASKING)
    _, losses = distil(student, teacher, inputs, **options, **possible(name))
    levels, layers = len(student.spec.features["encoder"]), student.spec.num_layers
    assert len(losses) == 2 * levels + (0 if name in PLACELESS else 3 * layers)
    for key, value in losses.items():
        assert value == 0 if "ground" in key else abs(value) < 1e-6, key
    _, apart = distil(student, other(name), inputs, **options, **possible(name))
    assert all(value > 1e-3 for key, value in apart.items() if key != "clockdistill_background_3"), apart


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_each_loss_reaches_the_backbone_and_the_projections(build, name):
    student, width = adapter_for(build(name).requires_grad_(True)), 64
    inputs = tiny.batch(64, padded=name in MASKING)
    method, losses = distil(student, other(name, width), inputs, **possible(name))
    first = next(p for n, p in student.backbone_parameters() if n.endswith("weight") and p.ndim == 4)
    terms = {part: [v for n, v in losses.items() if n.startswith(part)] for part in method.weights}
    for part, values in terms.items():
        if values:
            found = torch.autograd.grad(torch.stack(values).sum(), first, retain_graph=True)[0]
            assert found.any() and found.isfinite().all(), part
    assert bool(terms["clockdistill_class"]) == (name not in PLACELESS)
    assert all(g.any() for g in torch.autograd.grad(total(losses), list(method.parameters())))


def quiet(model: nn.Module, training: bool) -> nn.Module:
    """In training mode, with statistics that no other image of the batch changes."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def one_of(inputs: dict[str, Any], image: int) -> dict[str, Any]:
    return {name: value[image : image + 1] for name, value in inputs.items()}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PLACED)
def test_an_image_counts_the_same_alone_and_beside_one_with_more_boxes(build, name, training):
    student, teacher = adapter_for(quiet(build(name), training)), other(name)
    inputs = tiny.batch(128, boxes=(2, 6, 0))  # a single cell of a single image has no GroupNorm
    together = distil(student, teacher, inputs)[1]
    alone = [distil(student, teacher, one_of(inputs, image))[1] for image in range(3)]
    for key, value in together.items():
        torch.testing.assert_close(value, sum(losses[key] for losses in alone) / 3, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PLACED)
def test_rows_of_padding_are_out_of_the_self_attention_of_real_rows(build, name, training):
    adapter = adapter_for(quiet(build(name), training))
    inputs = tiny.batch(64, boxes=(2, 6))
    output, targets = adapter(inputs["pixel_values"])[0], Targets.from_labels(inputs["labels"])
    queries = target_queries(targets)
    before = output.decode(queries)
    moved = queries.boxes.clone()
    moved[~targets.valid] = tiny.random_boxes(4)
    after, seen = (
        output.decode(replace(queries, boxes=moved)),
        output.decode(replace(queries, boxes=moved, groups=None)),
    )
    for layer, same in zip(before, after, strict=True):
        torch.testing.assert_close(same.logits[0, :2], layer.logits[0, :2], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(same.boxes[0, :2], layer.boxes[0, :2], atol=1e-5, rtol=1e-5)
        assert (same.logits[0, 2:] - layer.logits[0, 2:]).abs().max() > 1e-3
    # Not in the first layer where every content is zero: there self-attention passes nothing on.
    assert (seen[-1].logits[0, :2] - before[-1].logits[0, :2]).abs().max() > 1e-4


@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (0,)], ids=str)
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_images_without_boxes_have_only_background_and_a_graph_of_finite_gradients(build, name, counts):
    student = adapter_for(build(name).requires_grad_(True))
    _, losses = distil(student, other(name), tiny.batch(128, boxes=counts), **possible(name))
    assert all(value.requires_grad for value in losses.values())
    for key, value in losses.items():
        found = gradients(student.model, value)
        assert all(gradient.isfinite().all() for gradient in found.values()), key
        if sum(counts) == 0 and "background" not in key:
            assert value == 0 and not any(gradient.any() for gradient in found.values()), key
        else:
            assert value > 0 and value.isfinite(), key
    total(losses).backward()


@pytest.mark.parametrize(
    ("teacher_name", "student_name"),
    [
        ("rt_detr", "deformable_detr/two_stage"),
        ("deformable_detr/plain", "rt_detr"),
        ("conditional_detr", "lw_detr"),
        ("dab-detr", "conditional_detr"),
        ("d_fine", "rf_detr"),
    ],
)
def test_unlike_detectors_distil(build: Callable, teacher_name, student_name):
    teacher = Teacher(tiny.build(teacher_name, 64, seed=1, decoder_layers=2, num_queries=9), tiny.LABELS)
    student = adapter_for(build(student_name).requires_grad_(True))
    method, losses = distil(student, teacher, tiny.batch(64, boxes=(3, 0)))
    assert {name.rsplit("_", 1)[0] for name in losses} == method.weights.keys()
    assert all(value.isfinite() and value > 0 for value in losses.values())
    first = next(p for n, p in student.backbone_parameters() if n.endswith("weight") and p.ndim == 4)
    assert torch.autograd.grad(total(losses), first)[0].any()


def test_detectors_without_a_shared_place_distil_their_memory(build):
    student = adapter_for(build("detr").requires_grad_(True))
    for teacher in (other("detr", 64), other("rt_detr", 64)):
        _, losses = distil(student, teacher, tiny.batch(64), **ONLY_MEMORY)
        assert len(losses) == 2 and all(value > 0 and value.requires_grad for value in losses.values())
