"""The detection loss is the same whatever the number of processes and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from hf_detrkd.adapters import adapter_for
from hf_detrkd.losses.criterion import Answers, Denoising
from hf_detrkd.structures.outputs import Predictions
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import each, tiny
from tests.losses.criterion import (
    CRITERIA,
    DENOISING,
    assert_same_loss,
    assert_same_parameter_gradients,
    criterion_of,
    loss_of,
    random_predictions,
    tensors_of,
)


def share_of(counts: Sequence[int], parts: int, queries: int) -> BatchTotals:
    """The totals of a whole batch, per part, as tensors: so they come from other processes."""
    numbers = (len(counts), sum(counts), sum(min(count, queries) for count in counts), sum(map(bool, counts)))
    return BatchTotals(*torch.tensor([*(number / parts for number in numbers), float(parts)]))


def rows(predictions: Predictions, part: slice) -> Predictions:
    return replace(predictions, logits=predictions.logits[part], boxes=predictions.boxes[part])


def slices(sizes: Sequence[int]) -> list[slice]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


SPLITS = [[2, 2], [1, 3], [1, 1, 1, 1]]
BATCHES = [(2, 1, 3, 2), (0, 0, 2, 9), (0, 0, 0, 0), (4, 0, 0, 1)]
"""With parts that hold no box, and with more boxes than queries."""


@each("family", CRITERIA)
@each("sizes", SPLITS)
@each("counts", BATCHES)
def test_the_mean_over_parts_with_common_totals_is_the_loss_of_the_whole_batch(family, counts, sizes):
    criterion, labels = criterion_of(tiny.config(family)), tiny.batch(boxes=counts)["labels"]
    layers = [random_predictions(criterion, 4) for _ in range(tiny.NUM_LAYERS + 1)]
    *decoder, encoder = layers
    answers = Answers(tuple(decoder), encoder=encoder)
    whole = criterion(answers, Targets.from_labels(labels), BatchTotals.of(counts, 7))
    totals = share_of(counts, len(sizes), 7)
    parts = []
    for part in slices(sizes):
        answers = Answers(tuple(rows(p, part) for p in decoder), encoder=rows(encoder, part))
        parts.append(criterion(answers, Targets.from_labels(labels[part]), totals))
    for name, expected in whole.items():
        mean = sum(part[name] for part in parts) / len(parts)
        torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)
    mean = sum(sum(part.values()) for part in parts) / len(parts)
    assert_same_loss(mean, sum(whole.values()), tensors_of(layers))


@pytest.mark.parametrize("family", CRITERIA)
def test_the_mean_over_parts_with_their_own_totals_is_another_loss(family):
    criterion, labels = criterion_of(tiny.config(family)), tiny.batch(boxes=(4, 0, 0, 1))["labels"]
    layers = [random_predictions(criterion, 4)]
    whole = criterion(Answers(tuple(layers)), Targets.from_labels(labels), BatchTotals.of((4, 0, 0, 1), 7))
    parts = []
    for part in slices([2, 2]):
        targets = Targets.from_labels(labels[part])
        answers = Answers((rows(layers[0], part),))
        parts.append(criterion(answers, targets, BatchTotals.of(targets.counts, 7)))
    assert abs(sum(sum(part.values()) for part in parts) / 2 - sum(whole.values())) > 0.1


def test_denoising_parts_with_common_totals_average_to_that_of_the_whole_batch():
    criterion, counts, groups = criterion_of(tiny.config("rt_detr")), (2, 1, 0, 2), 5
    labels = tiny.batch(boxes=counts)["labels"]
    layers, copies = ([random_predictions(criterion, 4, queries)] for queries in (7, 2 * 2 * groups))
    answers = Answers(tuple(layers), denoising=Denoising(tuple(copies), groups))
    whole = criterion(answers, Targets.from_labels(labels), BatchTotals.of(counts, 7))
    parts = []
    for part in slices([2, 2]):
        denoising = Denoising((rows(copies[0], part),), groups)
        answers = Answers((rows(layers[0], part),), denoising=denoising)
        parts.append(criterion(answers, Targets.from_labels(labels[part]), share_of(counts, 2, 7)))
    for name, expected in whole.items():
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, expected)


@pytest.mark.parametrize("sizes", [[2, 2], [1, 3]])
@pytest.mark.parametrize("counts", [(2, 1, 3, 0), (0, 0, 2, 9)])
def test_micro_batches_of_a_model_accumulate_to_the_step_of_the_whole_batch(build, family, counts, sizes):
    overrides = {"num_denoising": 0} if family in DENOISING else {}  # its noise would differ
    if family == "deimv2":
        overrides["use_dense_one_to_one"] = False  # the size of the union is known to each micro-batch alone
    adapter = adapter_for(build(family, **overrides))  # eval: BatchNorm would see other batches
    inputs = tiny.batch(96, boxes=counts)
    whole = sum(loss_of(adapter, inputs).values())
    totals = share_of(counts, 2, tiny.NUM_QUERIES)
    parts = [
        sum(loss_of(adapter, {name: value[part] for name, value in inputs.items()}, totals).values())
        for part in slices(sizes)
    ]
    # Other batch sizes take other convolutions: random box refinements amplify their rounding.
    assert_same_parameter_gradients(adapter.model, sum(parts) / 2, whole, tolerance=5e-5)
