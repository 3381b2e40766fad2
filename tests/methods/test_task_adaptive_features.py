"""Task-adaptive regularization of features: its mask and its loss against plain loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_detrkd.methods.task_adaptive import gaussian_mask
from hf_detrkd.structures.outputs import FeatureMap
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import each
from tests.methods import naive
from tests.methods.fakes import spec, targets_of
from tests.methods.task_adaptive import a_map, method_of, objects, output, proposing


Sizes = Sequence[tuple[int, int]]
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


@each("size", [(1, 1), (4, 5), (7, 3), (16, 13)])
@each("kind", KINDS)
@each("padded", [False, True])
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


def naive_standard(values: Tensor) -> Tensor:
    """One image's channels `(D, height, width)` with mean 0 and variance 1."""
    return torch.stack([(channel - channel.mean()) / (channel.var(correction=0) + 1e-5) ** 0.5 for channel in values])


def naive_features(
    own: FeatureMap, goal: FeatureMap, targets: Targets, weight: Tensor, bias: Tensor, standard: bool
) -> Tensor:
    """One level, the student's channels changed by `weight` `(D, own channels)` and `bias`: the sum over images."""
    total = torch.zeros((), dtype=torch.float64)
    for image, label in enumerate(targets.to_labels()):
        height, width = real_size(goal, image)
        own_height, own_width = real_size(own, image)
        mine = torch.einsum("dc,cyx->dyx", weight, own.values[image, :, :own_height, :own_width].double())
        mine = naive.bilinear(mine + bias[:, None, None], height, width)
        theirs = goal.values[image, :, :height, :width].double()
        if standard:
            mine, theirs = naive_standard(mine), naive_standard(theirs)
        mask = bells(label["boxes"].double(), height, width)
        for y, x in itertools.product(range(height), range(width)):
            for wanted, given in zip(theirs[:, y, x], mine[:, y, x], strict=True):
                share = 2 * len(weight) * max(float(mask.sum()), 1.0)
                total = total + mask[y, x] * (wanted - given) ** 2 / share
    return total


@each(
    ("sizes", "widths", "goals", "nearest"),
    [
        ([(4, 5)], (4,), [(4, 5)], [0]),
        ([(4, 5)], (3,), [(4, 5)], [0]),
        ([(9, 10), (3, 6)], (4, 3), [(5, 5), (2, 3)], [0, 1]),
        ([(3, 4)], (5,), [(6, 7)], [0]),
        ([(13, 12), (6, 6), (2, 2)], (4, 3, 4), [(7, 7), (3, 3)], [0, 0, 1]),
        ([(8, 8), (3, 4)], (3, 4), [(16, 12), (9, 9), (4, 4), (1, 1)], [1, 2]),
    ],
)
@each("counts", [(2, 0, 1), (3,), (0, 0)])
@each("padded", ["", "both", "student", "teacher"])
@each(("level", "standard"), [("neck", True), ("neck", False), ("encoder", True)])
def test_features_equal_the_loop_on_every_level(
    sizes: Sizes, widths, goals: Sizes, nearest, counts, padded, level, standard
):
    specs = proposing(widths=widths), spec(neck=(4,) * len(goals))
    method = method_of(*specs, feature_level=level, standardize_features=standard)
    targets, batch = targets_of(*counts), len(counts)
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
        expected = naive_features(mine, theirs[place], targets, weight, bias, standard) / 7
        torch.testing.assert_close(losses[f"task_adaptive_features_{k}"].double(), expected, atol=1e-5, rtol=1e-4)
        assert (expected > 1e-3) == (sum(counts) > 0) or (standard and goals[place] == (1, 1))
