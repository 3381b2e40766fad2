"""The detection loss in a model's training step: the loss and gradients of the model itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_detrkd.adapters import adapter_for
from hf_detrkd.losses.criterion import ModelCriterion
from hf_detrkd.structures.targets import Targets
from tests import tiny
from tests.losses.aligned import aligned_loss
from tests.losses.criterion import DENOISING, GROUPED, assert_same_parameter_gradients, comparable, loss_of, reference


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
