"""CLoCKDistill's memory: which cells are objects, and its losses against naive loops."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_detrkd.methods import CLoCKDistill, CLoCKDistillConfig
from hf_detrkd.methods.clockdistill import location_scales
from hf_detrkd.structures.outputs import FeatureMap
from hf_detrkd.structures.targets import Targets
from tests.methods import naive
from tests.methods.backward import total
from tests.methods.clockdistill import ONLY_MEMORY, ONLY_QUERIES, compare, losses_of
from tests.methods.fakes import Fake, spec, targets_of, truth_of


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
    """The oracle weighs with the published alpha and beta."""
    published = CLoCKDistillConfig(foreground_alpha=5e-5, background_beta=1e-7)
    weights = CLoCKDistill(published, spec(), spec()).weights
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
