"""Intended differences from transformers' detection losses: every fault and its fix. See `PAPERS.md`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers.loss import loss_for_object_detection
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher

from hf_detrkd.adapters import adapter_for
from hf_detrkd.losses.criterion import Answers
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import tiny
from tests.losses.aligned import aligned_parts
from tests.losses.criterion import (
    COUNTS,
    assert_same_loss,
    criterion_of,
    loss_of,
    random_predictions,
    reference,
    tensors_of,
)


def gradients(loss: Tensor, parameters: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True))


# --- box counts over processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["detr", "deformable_detr/plain", "rt_detr"])
def test_box_losses_of_two_processes_average_to_one_by_us_and_not_by_transformers(family, monkeypatch):
    """Two processes with 6 and 1 boxes. transformers averages the count and divides it by the processes again (DETR),
    so that losses double, or does not look at other processes at all (RT-DETR)."""
    config = tiny.config(family, auxiliary_loss=False)
    criterion, counts = criterion_of(config), (6, 1)
    labels = tiny.batch(boxes=counts)["labels"]
    answers = random_predictions(criterion, 2)
    rows = [
        type(answers)(answers.logits[i : i + 1], answers.boxes[i : i + 1], None, answers.activation) for i in (0, 1)
    ]
    weight = 1.0 if family == "rt_detr" else criterion.box_weight  # the parts of RT-DETR are weighted already
    whole = weight * reference(config, [answers], labels)[1]["loss_bbox"]

    monkeypatch.setattr(loss_for_object_detection, "is_accelerate_available", lambda: True)
    monkeypatch.setattr(loss_for_object_detection.PartialState, "_shared_state", {"num_processes": 2})
    monkeypatch.setattr(loss_for_object_detection.PartialState, "num_processes", 2, raising=False)
    monkeypatch.setattr(loss_for_object_detection, "reduce", lambda count: torch.full_like(count, 3.5))  # their mean
    theirs = sum(reference(config, [rows[i]], labels[i : i + 1])[1]["loss_bbox"] for i in (0, 1)) / 2
    totals = BatchTotals(1.0, 3.5, 3.5, 1.0, share=2.0)
    ours = [criterion(Answers((rows[i],)), Targets.from_labels(labels[i : i + 1]), totals)["box"] for i in (0, 1)]
    torch.testing.assert_close(sum(ours) / 2, whole, atol=1e-5, rtol=1e-5)
    theirs = weight * theirs
    assert abs(theirs - whole) > 1e-3 * whole
    if family != "rt_detr":
        torch.testing.assert_close(theirs, 2 * whole, atol=1e-5, rtol=1e-5)


# --- D-FINE and DEIMv2 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["d_fine", "deimv2"])
def test_layers_of_d_fine_are_beside_their_own_distributions_by_us_and_not_by_transformers(build, family):
    """transformers pairs the answers of layer i with the distributions of layer i + 1: the layer before the last gets
    no class or box loss, and the last no FGL."""
    model = build(family).train().requires_grad_(True)
    adapter, inputs = adapter_for(model), tiny.batch(96)
    losses = loss_of(adapter, inputs)
    torch.manual_seed(0)
    theirs = model(**inputs)
    aligned = sum(aligned_parts(model.config, theirs, inputs["labels"]).values())
    torch.testing.assert_close(sum(losses.values()), aligned, atol=1e-4, rtol=1e-5)
    assert abs(theirs.loss - aligned) > 0.01 * aligned

    model.config.num_denoising = 0
    theirs = model(**inputs)
    logits, corners = gradients(theirs.loss, [theirs.intermediate_logits, theirs.intermediate_predicted_corners])
    supervised = [bool(layer.any()) for layer in logits.unbind(1)]  # the first guess, then the layers
    assert supervised[-2:] == [False, True]
    assert corners is None or (corners[:, 0].any() and not corners[:, -1].any())  # early versions: no FGL
    _, answers = adapter.encode(inputs["pixel_values"], None, Targets.from_labels(inputs["labels"]))
    loss = adapter.criterion(answers, Targets.from_labels(inputs["labels"]), BatchTotals.of((2, 1), 7))
    for layer in answers.layers:
        assert gradients(sum(loss.values()), [layer.logits])[0].any()
    (corners,) = gradients(sum(loss.values()), [answers.edges.logits])
    assert all(layer.any() for layer in corners[:-1])
    assert corners[-1].any() or not loss["fgl"].any()  # boxes that overlap nothing weigh nothing


# --- two-stage Deformable DETR ---------------------------------------------------------------------------------------


def test_proposals_of_a_two_stage_deformable_detr_are_trained_by_us_and_not_by_transformers(build):
    adapter = adapter_for(build("deformable_detr/two_stage").train())
    inputs = tiny.batch(128, padded=True)
    base = adapter.model.model
    heads = [base.enc_output, base.enc_output_norm, base.decoder.class_embed[-1], base.decoder.bbox_embed[-1]]
    parameters = [parameter for head in heads for parameter in head.parameters()]
    theirs = torch.autograd.grad(adapter.model(**inputs).loss, parameters, allow_unused=True)
    ours = torch.autograd.grad(sum(loss_of(adapter, inputs).values()), parameters, allow_unused=True)
    assert all(gradient is None for gradient in theirs)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in ours)
    assert all(gradient.any() for gradient, p in zip(ours, parameters, strict=True) if len(p) != tiny.NUM_CLASSES)
    assert ours[4][0].any()  # objectness; proposals know no other class


@pytest.mark.parametrize("counts", COUNTS)
def test_proposals_of_a_two_stage_deformable_detr_are_matched_as_objects_of_class_zero(counts):
    config = tiny.config("deformable_detr/two_stage")
    criterion, labels = criterion_of(config), tiny.batch(boxes=counts)["labels"]
    layers, proposals = (
        [random_predictions(criterion, len(counts), queries) for _ in range(tiny.NUM_LAYERS)] for queries in (7, 40)
    )
    targets, totals = Targets.from_labels(labels), BatchTotals.of(counts, 7)
    losses = criterion(Answers(tuple(layers), encoder=proposals[0]), targets, totals)
    objects = [{**label, "class_labels": torch.zeros_like(label["class_labels"])} for label in labels]
    expected, _ = reference(config, proposals[:1], objects)
    found = sum(losses[f"{name}_encoder"] for name in ("class", "box", "giou"))
    assert_same_loss(found, expected, tensors_of(proposals[:1]))
    alone = criterion(Answers(tuple(layers)), targets, totals)
    assert alone.keys() == {"class", "box", "giou"}
    for name, value in alone.items():
        torch.testing.assert_close(losses[name], value)


# --- Conditional DETR and DAB-DETR -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["conditional_detr", "dab-detr"])
def test_the_class_weight_of_the_config_counts_for_us_and_not_for_transformers(family):
    labels = tiny.batch(boxes=(3, 2))["labels"]
    found = {}
    for weight in (1, 2):
        config = tiny.config(family, cls_loss_coefficient=weight, auxiliary_loss=False)
        criterion = criterion_of(config)
        torch.manual_seed(1)
        layers = [random_predictions(criterion, 2)]
        theirs, _ = reference(config, layers, labels)
        ours = criterion(Answers(tuple(layers)), Targets.from_labels(labels), BatchTotals.of((3, 2), 7))
        found[weight] = (theirs, sum(ours.values()), ours["class"])
    torch.testing.assert_close(found[1][0], found[2][0])  # transformers ignores it
    torch.testing.assert_close(found[1][0], found[1][1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[2][1] - found[1][1], found[1][2], atol=1e-5, rtol=1e-5)


# --- LW-DETR and RF-DETR ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["lw_detr", "rf_detr"])
def test_evaluation_matches_all_queries_at_once_by_us_and_in_groups_by_transformers(build, family):
    """In evaluation one group is left; transformers still splits it, so that a box is matched several times."""
    model, inputs = build(family).eval(), tiny.batch(64, boxes=(2, 1))
    output = model(**inputs)
    ours = sum(loss_of(adapter_for(model), inputs).values())
    one_group = copy.deepcopy(model.config)
    one_group.group_detr = 1
    right, _ = reference(
        one_group,
        adapter_for(model)(inputs["pixel_values"])[0].layers,
        inputs["labels"],
        enc_outputs_class=output.enc_outputs_class,
        enc_outputs_coord=output.enc_outputs_coord_logits,
    )
    torch.testing.assert_close(ours, right, atol=1e-5, rtol=1e-5)
    assert abs(output.loss - right) > 1e-4 * right
    outputs = {"logits": output.logits[:, :6], "pred_boxes": output.pred_boxes[:, :6]}
    matched = LwDetrHungarianMatcher()(outputs, inputs["labels"], tiny.NUM_GROUPS)
    assert len(matched[0][0]) == 2 * tiny.NUM_GROUPS


# --- DETR, Table Transformer and Conditional DETR --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["detr", "table-transformer", "conditional_detr"])
def test_auxiliary_losses_change_the_answers_of_transformers_and_not_ours(build, family):
    model, inputs = build(family), tiny.batch(96)
    pixels = inputs["pixel_values"]
    adapter = adapter_for(model)
    answers = []
    for auxiliary in (False, True):
        adapter.criterion = adapter.criterion.with_auxiliary(auxiliary)
        output, _ = adapter(pixels, targets=Targets.from_labels(inputs["labels"]))
        answers.append(output.layers[-1].logits)
    assert torch.equal(*answers)
    plain = model(pixels).logits
    model.config.auxiliary_loss = True
    assert (model(pixels).logits - plain).abs().max() > 0.01
    torch.testing.assert_close(answers[0], plain, atol=1e-5, rtol=1e-5)
