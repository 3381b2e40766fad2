"""DETRDistill's features against naive loops, and which maps are compared with which."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_detrkd.methods import DETRDistill, DETRDistillConfig
from hf_detrkd.structures.outputs import FeatureMap
from hf_detrkd.structures.targets import Targets
from tests.methods import naive
from tests.methods.detrdistill import ONLY_FEATURE, VARIANTS, compare, losses_of
from tests.methods.fakes import HEADS, Fake, by_image, spec, targets_of, truth_of


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


def test_maps_that_are_not_as_wide_as_the_teacher_s_states_are_refused():
    wide = replace(spec(), features={"neck": (8, 12), "encoder": (8, 8)})
    message = (
        r"teacher's decoder states \(8 wide\) with its neck maps \(\[8, 12\] wide\): set feature_level to the other"
    )
    with pytest.raises(ValueError, match=message):
        DETRDistill(DETRDistillConfig(), spec(), wide)
    DETRDistill(DETRDistillConfig(feature_level="encoder"), spec(), wide)
    DETRDistill(DETRDistillConfig(feature_weight=0.0), spec(), wide)
