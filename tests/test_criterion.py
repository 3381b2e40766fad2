"""The detection loss of every family: transformers' own value and gradient, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
from transformers.loss.loss_lw_detr import LwDetrForObjectDetectionLoss
from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

from hf_detrkd.adapters import ADAPTERS, DetectorAdapter, adapter_for
from hf_detrkd.criterion import Answers, Denoising, DetectionCriterion, ModelCriterion
from hf_detrkd.outputs import Predictions
from hf_detrkd.targets import BatchTotals, Targets
from tests import tiny
from tests.aligned import aligned_loss


LOSSES = {
    "detr": ForObjectDetectionLoss,
    "table-transformer": ForObjectDetectionLoss,
    "yolos": ForObjectDetectionLoss,
    "conditional_detr": DeformableDetrForObjectDetectionLoss,
    "dab-detr": DeformableDetrForObjectDetectionLoss,
    "deformable_detr": DeformableDetrForObjectDetectionLoss,
    "rt_detr": RTDetrForObjectDetectionLoss,
    "rt_detr_v2": RTDetrForObjectDetectionLoss,
    "lw_detr": LwDetrForObjectDetectionLoss,
    "rf_detr": LwDetrForObjectDetectionLoss,
}
CRITERIA = (
    "detr",
    "table-transformer",
    "conditional_detr",
    "dab-detr",
    "deformable_detr/two_stage",
    "rt_detr",
    "rt_detr_v2",
    "lw_detr",
    "rf_detr",
)
"""The forms of Deformable DETR share one; D-FINE and DEIMv2 are in `test_distributions.py`."""
DENOISING, GROUPED = tiny.DENOISING, tiny.GROUPED
SOFTMAX = ("detr", "table-transformer", "yolos")
COUNTS = [(2, 1), (3, 0), (0, 0), (9, 2), (1, 4, 12, 0)]
"""Boxes per image, of 7 queries: usual, an empty image, no box at all, more boxes than queries."""


def criterion_of(config: transformers.PreTrainedConfig) -> DetectionCriterion:
    return ADAPTERS[config.model_type].criterion_of(config)


def comparable(family: str, **overrides: Any) -> dict[str, Any]:
    """Config fields without which transformers' loss is another on purpose: see `test_criterion_faults.py`."""
    return overrides | ({"cls_loss_coefficient": 1} if family in ("conditional_detr", "dab-detr") else {})


def random_predictions(criterion: DetectionCriterion, batch: int, queries: int = tiny.NUM_QUERIES) -> Predictions:
    """Leaves of a graph."""
    softmax = criterion.classification == "cross_entropy"
    logits = (torch.randn(batch, queries, tiny.NUM_CLASSES + softmax) * 2).requires_grad_()
    boxes = tiny.random_boxes(batch, queries).requires_grad_()
    return Predictions(logits, boxes, None, "softmax" if softmax else "sigmoid")


def tensors_of(predictions: Sequence[Predictions]) -> list[Tensor]:
    return [tensor for one in predictions for tensor in (one.logits, one.boxes)]


def assert_same_loss(loss: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> None:
    """Equal values, and equal gradients with respect to `inputs`."""
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    pairs = (torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True) for value in (loss, expected))
    for found, wanted in zip(*pairs, strict=True):
        if found is None or wanted is None:
            assert all(gradient is None or not gradient.any() for gradient in (found, wanted))
        else:
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def reference(
    config: transformers.PreTrainedConfig,
    layers: Sequence[Predictions],
    labels: list[dict[str, Tensor]],
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """transformers' loss of these predictions."""
    dim = 1 if config.model_type in DENOISING else 0
    logits, boxes = (torch.stack(parts, dim) for parts in ([p.logits for p in layers], [p.boxes for p in layers]))
    last = layers[-1]
    loss, parts, _ = LOSSES[config.model_type](
        last.logits, labels, torch.device("cpu"), last.boxes, config, logits, boxes, **options
    )
    return loss, parts


# --- equal to transformers -------------------------------------------------------------------------------------------


def proposals_as(family: str, proposals: Predictions | None) -> dict[str, Tensor]:
    """Encoder proposals by the names of transformers' loss."""
    names = ("enc_outputs_class", "enc_outputs_coord") if family in GROUPED else ("enc_topk_logits", "enc_topk_bboxes")
    return {} if proposals is None else dict(zip(names, tensors_of([proposals]), strict=True))


# Without boxes transformers divides by one, ours by one for every group.
PAIRS = [(family, counts) for family in CRITERIA for counts in COUNTS if sum(counts) or family not in GROUPED]


@pytest.mark.parametrize(("family", "counts"), PAIRS)
@pytest.mark.parametrize(("depth", "queries"), [(2, 7), (4, 30)])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_value_and_gradient_are_those_of_transformers(family, counts, depth, queries, auxiliary):
    config = tiny.config(family, **comparable(family, decoder_layers=depth, auxiliary_loss=auxiliary))
    criterion = replace(criterion_of(config), auxiliary=auxiliary)
    groups = tiny.NUM_GROUPS if family in GROUPED else 1
    labels = tiny.batch(boxes=counts)["labels"]
    layers = [random_predictions(criterion, len(counts), groups * queries) for _ in range(depth)]
    two_stage = family in GROUPED or (family in DENOISING and auxiliary)
    proposals = random_predictions(criterion, len(counts), groups * queries) if two_stage else None
    expected, _ = reference(config, layers, labels, **proposals_as(family, proposals))
    answers = Answers(tuple(layers), groups, proposals)
    losses = criterion(answers, Targets.from_labels(labels), BatchTotals.of(counts, queries))
    assert_same_loss(sum(losses.values()), expected, tensors_of(layers if proposals is None else [*layers, proposals]))


COEFFICIENTS = {"bbox_loss_coefficient": 3, "giou_loss_coefficient": 4}
RT_DETR = {
    "weight_loss_vfl": 2.0,
    "weight_loss_bbox": 3.0,
    "weight_loss_giou": 4.0,
    "focal_loss_alpha": 0.5,
    "focal_loss_gamma": 3.0,
    "matcher_alpha": 0.4,
    "matcher_gamma": 1.0,
}
WEIGHTS = {
    **dict.fromkeys(("detr", "table-transformer"), COEFFICIENTS | {"eos_coefficient": 0.3, "class_cost": 4}),
    **dict.fromkeys(
        ("conditional_detr", "dab-detr", "deformable_detr"), COEFFICIENTS | {"focal_alpha": 0.4, "bbox_cost": 1}
    ),
    **dict.fromkeys(("rt_detr", "rt_detr_v2"), RT_DETR),
    **dict.fromkeys(GROUPED, COEFFICIENTS | {"class_loss_coefficient": 2, "focal_alpha": 0.4, "giou_cost": 1}),
}


@pytest.mark.parametrize("family", CRITERIA)
def test_the_weights_are_those_of_the_config(family):
    plain = tiny.config(family)
    overrides = comparable(family, auxiliary_loss=True, **WEIGHTS[plain.model_type])
    config = tiny.config(family, **overrides | {"group_detr": 1} if family in GROUPED else overrides)
    assert criterion_of(config) != criterion_of(plain)
    labels = tiny.batch(boxes=(3, 2))["labels"]
    layers = [random_predictions(criterion_of(config), 2) for _ in range(tiny.NUM_LAYERS + 1)]
    layers, proposals = (layers[:-1], layers[-1]) if family in DENOISING + GROUPED else (layers[1:], None)
    expected, _ = reference(config, layers, labels, **proposals_as(family, proposals))
    answers = Answers(tuple(layers), encoder=proposals)
    losses = criterion_of(config)(answers, Targets.from_labels(labels), BatchTotals.of((3, 2), 7))
    assert_same_loss(sum(losses.values()), expected, tensors_of(layers))


def loss_of(adapter: DetectorAdapter, inputs: dict[str, Any], totals: BatchTotals | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)  # denoising draws random numbers
    targets = Targets.from_labels(inputs["labels"])
    return adapter(inputs["pixel_values"], inputs.get("pixel_mask"), targets, totals)[1]


def trainable(model: torch.nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def assert_same_parameter_gradients(
    model: torch.nn.Module, loss: Tensor, expected: Tensor, tolerance: float = 1e-5
) -> None:
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    first, second = (torch.autograd.grad(v, trainable(model), allow_unused=True) for v in (loss, expected))
    scale = max(gradient.abs().max() for gradient in second if gradient is not None)
    assert scale > 1e-3
    for name, found, wanted in zip(names, first, second, strict=True):
        found, wanted = (torch.zeros(()) if gradient is None else gradient for gradient in (found, wanted))
        assert (found - wanted).abs().max() < tolerance * max(scale, 1), name


# RT-DETR and its descendants without auxiliary losses train neither their encoder nor their denoising; YOLOS crashes
# with them.
STEPS = [
    (name, flag, size, counts)
    for name in tiny.FAMILIES
    for flag in (False, True)
    for size, counts in ((96, (2, 1)), (96, (0, 0)), (128, (9, 0)))
    if not ((name in DENOISING and not flag) or (name == "yolos" and flag) or (name in GROUPED and not sum(counts)))
]


@pytest.mark.parametrize(("family", "auxiliary", "size", "counts"), STEPS)
def test_a_training_step_has_the_loss_and_gradients_of_the_model_itself(build, family, counts, auxiliary, size):
    late = family in ("detr", "table-transformer", "conditional_detr")  # with auxiliary_loss they compute otherwise
    options = comparable(family, auxiliary_loss=auxiliary and not late)
    adapter = adapter_for(build(family, **options).train().requires_grad_(True))
    adapter.criterion = replace(adapter.criterion, auxiliary=auxiliary)
    inputs = tiny.batch(size, boxes=counts, padded=adapter.uses_pixel_mask)
    losses = loss_of(adapter, inputs)
    torch.manual_seed(0)
    if late and auxiliary:
        config = tiny.config(family, **options | {"auxiliary_loss": True})
        layers = adapter(inputs["pixel_values"], inputs["pixel_mask"])[0].layers
        expected, _ = reference(config, layers, inputs["labels"])
    elif family in ("d_fine", "deimv2"):
        expected = aligned_loss(adapter.model, inputs)
    else:
        expected = adapter.model(**inputs).loss
    # Two-stage Deformable DETR: transformers leaves the proposals without a loss.
    loss = sum(value for name, value in losses.items() if "deformable" not in family or not name.endswith("_encoder"))
    assert_same_parameter_gradients(adapter.model, loss, expected)


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2"])
@pytest.mark.parametrize("counts", [(2, 1), (0, 3), (9, 2), (5, 5)])
def test_denoising_and_encoder_parts_are_those_of_transformers(build, family, counts):
    adapter = adapter_for(build(family).train())
    inputs = tiny.batch(boxes=counts)
    losses = loss_of(adapter, inputs)
    torch.manual_seed(0)
    parts = adapter.model(**inputs).loss_dict
    for name, theirs in (("class", "loss_vfl"), ("box", "loss_bbox"), ("giou", "loss_giou")):
        denoising = sum(parts[f"{theirs}_dn_{layer}"] for layer in range(tiny.NUM_LAYERS))
        layers = parts[theirs] + sum(parts[f"{theirs}_aux_{layer}"] for layer in range(tiny.NUM_LAYERS - 1))
        proposals = parts[f"{theirs}_aux_{tiny.NUM_LAYERS - 1}"]
        for suffix, expected in (("", layers), ("_encoder", proposals), ("_denoising", denoising)):
            torch.testing.assert_close(losses[name + suffix], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", DENOISING)
def test_a_batch_without_boxes_has_no_denoising_part(build, family):
    adapter = adapter_for(build(family).train())
    assert not any(name.endswith("_denoising") for name in loss_of(adapter, tiny.batch(boxes=(0, 0))))
    assert any(name.endswith("_denoising") for name in loss_of(adapter, tiny.batch(boxes=(0, 1))))


def test_the_criterion_of_transformers_gives_the_loss_of_the_model_and_the_same_answers(build, family):
    adapter = adapter_for(build(family).train().requires_grad_(True))
    inputs = tiny.batch(96, padded=adapter.uses_pixel_mask)
    torch.manual_seed(0)
    ours, _ = adapter(inputs["pixel_values"], inputs.get("pixel_mask"), Targets.from_labels(inputs["labels"]))
    adapter.criterion = ModelCriterion()
    torch.manual_seed(0)
    theirs, parts = adapter(inputs["pixel_values"], inputs.get("pixel_mask"), Targets.from_labels(inputs["labels"]))
    torch.manual_seed(0)
    expected = adapter.model(**inputs).loss
    assert parts.keys() == {"transformers"} and theirs.loss.requires_grad
    torch.testing.assert_close(theirs.loss, expected)
    torch.testing.assert_close(theirs.layers[-1].logits, ours.layers[-1].logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", CRITERIA)
def test_half_precision_logits_under_autocast_give_the_loss_of_their_float32_values(family):
    criterion, labels = criterion_of(tiny.config(family)), tiny.batch(boxes=(3, 2))["labels"]
    half = [replace(one, logits=one.logits.bfloat16()) for one in (random_predictions(criterion, 2) for _ in range(3))]
    full = [replace(one, logits=one.logits.float()) for one in half]
    targets, totals = Targets.from_labels(labels), BatchTotals.of((3, 2), 7)
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion(Answers(tuple(half)), targets, totals)
    expected = criterion(Answers(tuple(full)), targets, totals)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- any number of processes and micro-batches -----------------------------------------------------------------------


def share_of(counts: Sequence[int], parts: int, queries: int) -> BatchTotals:
    """The totals of a whole batch, per part, as tensors: so they come from other processes."""
    numbers = (len(counts), sum(counts), sum(min(count, queries) for count in counts))
    return BatchTotals(*torch.tensor([*(number / parts for number in numbers), float(parts)]))


def rows(predictions: Predictions, part: slice) -> Predictions:
    return replace(predictions, logits=predictions.logits[part], boxes=predictions.boxes[part])


def slices(sizes: Sequence[int]) -> list[slice]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


SPLITS = [[2, 2], [1, 3], [1, 1, 1, 1]]
BATCHES = [(2, 1, 3, 2), (0, 0, 2, 9), (0, 0, 0, 0), (4, 0, 0, 1)]
"""With parts that hold no box, and with more boxes than queries."""


@pytest.mark.parametrize("family", CRITERIA)
@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("counts", BATCHES)
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
