"""Boxes as distributions: transformers' own functions, loops over edges, and the parts of the loss that use them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert
from transformers.loss.loss_d_fine import bbox2distance, weighting_function

from hf_detrkd.adapters import adapter_for
from hf_detrkd.losses.fine_grained import (
    EdgeDistributions,
    bin_offsets,
    decoupled_focal,
    edge_targets,
    fine_grained_localization,
)
from hf_detrkd.structures.targets import BatchTotals
from tests import tiny
from tests.losses.aligned import aligned_parts
from tests.losses.criterion import loss_of


FORMS = [(8, 0.5, 4.0), (32, 0.5, 4.0), (32, 1.0, 8.0), (16, 0.25, 2.0)]
PARTS = {"mal": "class", "vfl": "class", "bbox": "box", "giou": "giou", "fgl": "fgl", "ddf": "ddf"}


def random_edges(layers: int, batch: int, queries: int, form: tuple[int, float, float]) -> EdgeDistributions:
    bins, up, scale = form
    logits = torch.randn(layers, batch, queries, 4, bins + 1) * 2
    return EdgeDistributions(logits, tiny.random_boxes(batch, queries), up, scale)


@pytest.mark.parametrize("form", FORMS)
def test_bins_are_those_of_transformers(form):
    bins, up, scale = form
    expected = weighting_function(bins, torch.tensor([up]), scale)
    torch.testing.assert_close(bin_offsets(bins, up, scale, torch.device("cpu")), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_true_edges_lie_where_transformers_puts_them_inside_and_outside_of_the_bins(form):
    edges, targets = random_edges(1, 3, 20, form), tiny.random_boxes(3, 20)
    targets[:, :10, :2] += torch.randn(3, 10, 2) * 5  # far away
    index = torch.arange(20).expand(1, 3, 20)
    left, right = edge_targets(edges, index, targets)
    expected, by_right, by_left = bbox2distance(
        edges.boxes.flatten(0, 1),
        box_convert(targets, "cxcywh", "xyxy").flatten(0, 1),
        *form[:1],
        form[2],
        torch.tensor([form[1]]),
    )
    bins = form[0]
    found = torch.zeros(left.numel(), bins + 1)
    found.scatter_add_(1, left.flatten()[:, None], 1 - right.flatten()[:, None])
    found.scatter_add_(1, left.flatten()[:, None] + 1, right.flatten()[:, None])
    wanted = torch.zeros_like(found)
    wanted.scatter_add_(1, expected.long()[:, None], by_left[:, None])
    wanted.scatter_add_(1, expected.long()[:, None] + 1, by_right[:, None])
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)  # float32 beside a bin's border
    assert (right == 0).any() or (right == 1).any()


@pytest.mark.parametrize(
    ("layers", "batch", "queries", "most"), [(1, 1, 1, 1), (3, 2, 7, 4), (2, 3, 4, 6), (1, 2, 5, 0)]
)
def test_fgl_is_that_of_a_loop_over_edges(layers, batch, queries, most):
    edges, targets = random_edges(layers, batch, queries, FORMS[0]), tiny.random_boxes(batch, most)
    index, ious = tiny.random_index(layers, batch, queries, most), torch.rand(layers, batch, most)
    found = fine_grained_localization(edges, index, targets, ious)
    left, right = edge_targets(edges, index, targets)
    expected = torch.zeros(layers)
    for layer, image, box in torch.cartesian_prod(*map(torch.arange, (layers, batch, most))).tolist():
        query = index[layer, image, box].item()
        for edge in range(4) if query >= 0 else ():
            log_probabilities = edges.logits[layer, image, query, edge].log_softmax(-1)
            low, weight = left[layer, image, box, edge].item(), right[layer, image, box, edge]
            loss = -(1 - weight) * log_probabilities[low] - weight * log_probabilities[low + 1]
            expected[layer] += ious[layer, image, box] * loss
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("layers", "batch", "queries", "most"), [(2, 1, 1, 1), (3, 2, 7, 4), (4, 3, 4, 6), (2, 2, 5, 0)]
)
def test_ddf_is_that_of_a_loop_over_edges(layers, batch, queries, most):
    edges, logits = random_edges(layers, batch, queries, FORMS[0]), torch.randn(batch, queries, 5)
    index, ious = tiny.random_index(layers, batch, queries, most), torch.rand(layers, batch, most)
    found = torch.stack(decoupled_focal(edges, index, ious, logits))
    expected = torch.zeros(2, layers - 1)
    for layer, image, query in torch.cartesian_prod(*map(torch.arange, (layers - 1, batch, queries))).tolist():
        owners = (index[layer, image] == query).nonzero()[:, 0].tolist()
        weight = ious[layer, image, owners[0]] if owners else logits[image, query].sigmoid().max()
        for edge in range(4):
            goal = (edges.logits[-1, image, query, edge] / 5).softmax(-1)
            own = (edges.logits[layer, image, query, edge] / 5).log_softmax(-1)
            divergence = sum(p * (math.log(p) - q) for p, q in zip(goal.tolist(), own.tolist(), strict=True))
            expected[0 if owners else 1, layer] += weight * 25 * divergence
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_ddf_draws_layers_to_the_last_which_it_leaves_alone_and_is_zero_for_equal_ones():
    edges = random_edges(3, 2, 7, FORMS[0])
    edges = EdgeDistributions(edges.logits.requires_grad_(), edges.boxes, edges.up, edges.reg_scale)
    index, ious, logits = tiny.random_index(3, 2, 7, 4), torch.rand(3, 2, 4), torch.randn(2, 7, 5)
    loss = sum(part.sum() for part in decoupled_focal(edges, index, ious, logits))
    (gradient,) = torch.autograd.grad(loss, edges.logits)
    assert gradient[:-1].any() and not gradient[-1].any()
    with torch.no_grad():
        best = logits.sigmoid().amax(-1)[..., None, None] * torch.ones(2, 2, 7, 4, 1)
        goal, own = (edges.logits[-1] / 5).softmax(-1), (edges.logits[:-1] / 5).softmax(-1)
        free = (index[:-1, :, :, None] != torch.arange(7)).all(2)
    torch.testing.assert_close(gradient[:-1][free], (5 * best * (own - goal))[free], atol=1e-5, rtol=1e-4)
    same = EdgeDistributions(edges.logits[-1:].expand(3, -1, -1, -1, -1), edges.boxes, edges.up, edges.reg_scale)
    assert max(part.abs().max() for part in decoupled_focal(same, index, ious, logits)) < 1e-4


@pytest.mark.parametrize("family", ["d_fine", "deimv2"])
@pytest.mark.parametrize("counts", [(2, 1), (0, 3), (9, 2), (5, 5), (0, 0)])
@pytest.mark.parametrize(
    "overrides", [{}, {"weight_loss_fgl": 1.0, "weight_loss_ddf": 3.0, "up": 1.0, "reg_scale": 8.0}]
)
def test_every_part_of_the_loss_is_that_of_transformers_with_its_layers_aligned(build, family, counts, overrides):
    if family == "deimv2" and not overrides:
        overrides = {"mal_alpha": 0.3}
    adapter = adapter_for(build(family, **overrides).train())
    inputs = tiny.batch(96, boxes=counts)
    losses = loss_of(adapter, inputs)
    torch.manual_seed(0)
    parts = aligned_parts(adapter.model.config, adapter.model(**inputs), inputs["labels"])
    expected: dict[str, torch.Tensor] = {}
    for name, value in parts.items():
        kind, *place = name.removeprefix("loss_").split("_")
        suffix = "_denoising" if place[:1] == ["dn"] else "_encoder" if place == ["aux", str(tiny.NUM_LAYERS)] else ""
        key = PARTS[kind] + suffix
        expected[key] = expected.get(key, 0) + value
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), abs=1e-5, rel=1e-5), name


@pytest.mark.parametrize("dense", [False, True])
def test_deimv2_matches_its_boxes_densely_if_its_config_says_so(build, dense):
    adapter = adapter_for(build("deimv2", use_dense_one_to_one=dense).train())
    inputs = tiny.batch(96)
    losses = loss_of(adapter, inputs)
    torch.manual_seed(0)
    parts = aligned_parts(adapter.model.config, adapter.model(**inputs), inputs["labels"])
    torch.testing.assert_close(sum(losses.values()), sum(parts.values()), atol=1e-4, rtol=1e-5)


def test_without_auxiliary_layers_the_last_one_keeps_its_fgl_and_there_is_no_ddf(build):
    adapter = adapter_for(build("d_fine").train())
    adapter.criterion = adapter.criterion.with_auxiliary(False)
    losses = loss_of(adapter, tiny.batch(96), BatchTotals.of((2, 1), 7))
    assert "fgl" in losses and "ddf" not in losses


def test_edges_far_outside_and_boxes_without_size_give_finite_losses():
    edges = random_edges(1, 1, 2, FORMS[0])
    edges = EdgeDistributions(edges.logits, torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 1e-9, 1.0]]]), 0.5, 4.0)
    index, targets = torch.tensor([[[0, 1]]]), torch.tensor([[[9.0, -9.0, 0.1, 0.1], [0.5, 0.5, 0.0, 0.0]]])
    assert fine_grained_localization(edges, index, targets, torch.ones(1, 1, 2)).isfinite().all()
    assert F.cross_entropy(edges.logits[0, 0, 0], torch.zeros(4, dtype=torch.long)).isfinite()


@pytest.mark.parametrize("name", ["d_fine", "deimv2"])
@pytest.mark.parametrize("counts", [(7, 7), (8, 9), (20, 20)])
def test_where_every_query_is_matched_the_loss_stays_small(build, name, counts):
    losses = loss_of(adapter_for(build(name).train()), tiny.batch(96, boxes=counts))
    assert all(0 <= value < 1e3 for value in losses.values()), losses
