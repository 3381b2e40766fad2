"""Extra queries are supervised as a family's own queries are: the same kind of loss and the same weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hf_detrkd.adapters import adapter_for
from hf_detrkd.losses.criterion import Answers
from hf_detrkd.methods.detection_losses import supervised_losses, supervision_of
from hf_detrkd.structures.loss_key import LossKey
from hf_detrkd.structures.outputs import stacked
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import tiny


@pytest.mark.parametrize("counts", [(2, 1), (3, 0), (0, 0)])
def test_a_group_that_is_the_own_one_gets_the_same_loss(build, family, counts):
    adapter, inputs = adapter_for(build(family)), tiny.batch(64, boxes=counts)
    targets, totals = Targets.from_labels(inputs["labels"]), BatchTotals.of(counts, tiny.NUM_QUERIES)
    layers, own = adapter.encode(inputs["pixel_values"])[0].layers, supervision_of(adapter.spec)
    expected = adapter.criterion(Answers(layers), targets, totals)
    index = adapter.criterion.matcher(layers, targets)
    pairs = [(layer, layer, 1.0) for layer in range(len(layers))]
    losses = supervised_losses(partial(LossKey, "extra"), stacked(layers), index, targets, totals, own, pairs)
    weights = {"class": own.class_weight, "box": own.box_weight, "giou": own.giou_weight}
    if family == "deimv2":  # its boxes are supervised by the matchings of all layers
        weights = {"class": own.class_weight}
    for part, weight in weights.items():
        found = weight * sum(value for key, value in losses.items() if key.part == part)
        torch.testing.assert_close(found, expected[part], rtol=1e-5, atol=1e-6)
