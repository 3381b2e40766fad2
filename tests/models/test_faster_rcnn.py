"""Faster R-CNN behind transformers' interface against torchvision's own: detections, losses, weights, widths."""

from __future__ import annotations

import functools

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._api import WeightsEnum
from torchvision.ops import FrozenBatchNorm2d
from transformers import AutoModelForObjectDetection

from hf_detrkd.models import FasterRCNNForObjectDetection
from tests import tiny
from tests.models.faster_rcnn import (
    MOBILENET,
    OPTIONS,
    RESNET,
    RESNET_V2,
    SIZES,
    SMALL,
    TRANSFORM,
    assert_same_detections,
    border_labels,
    build,
    config,
    inputs_of,
    photographs,
    randomise,
    torchvision_targets,
    twin_of,
)


@pytest.mark.parametrize("name", [RESNET, pytest.param(RESNET_V2, marks=pytest.mark.slow), MOBILENET, SMALL])
@torch.no_grad()
def test_detections_are_those_of_torchvision(name):
    model, images = build(name), photographs()
    expected, output = twin_of(model)(images), model(**inputs_of(images))
    assert output.loss is None and output.loss_dict is None
    assert_same_detections(output, expected, SIZES)
    for own in expected:
        assert len(own["labels"].unique()) > 2 and own["scores"].max() - own["scores"].min() > 0.2
        assert (own["boxes"] == 0).any()  # some are cut off at a border


@pytest.mark.parametrize("name", [RESNET, MOBILENET, SMALL])
@torch.no_grad()
def test_training_losses_are_those_of_torchvision(name):
    options = {"box_batch_size_per_image": 64}
    model, images, labels = build(name, **options).train(), photographs(), border_labels()
    twin = twin_of(model, **options).train()
    torch.manual_seed(3)
    expected = twin(images, torchvision_targets(labels, SIZES))
    torch.manual_seed(3)
    output = model(**inputs_of(images), labels=labels)
    assert output.logits is None and output.pred_boxes is None
    assert {f"loss_{part}" for part in output.loss_dict} == expected.keys() and len(expected) == 4
    for part, value in output.loss_dict.items():
        assert value > 0
        torch.testing.assert_close(value, expected[f"loss_{part}"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, sum(expected.values()), atol=1e-5, rtol=1e-5)
    found = model.state_dict()
    for key, value in twin.state_dict().items():  # statistics of BatchNorm moved alike
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_images_of_one_size_need_no_mask_even_if_no_multiple_of_the_stride():
    model, sizes = build(), [(64, 70), (64, 70)]
    images = photographs(sizes)
    assert_same_detections(model(**inputs_of(images, masked=False)), twin_of(model)(images), sizes)


@torch.no_grad()
def test_sampling_in_training_is_random_and_follows_the_seed():
    model = build(box_batch_size_per_image=16).train()
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(model(**inputs_of(photographs()), labels=border_labels()).loss)
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


@torch.no_grad()
def test_options_are_torchvision_s_and_what_is_filled_up_is_no_detection():
    options = {"box_score_thresh": 0.8, "box_nms_thresh": 0.3, "box_detections_per_img": 40, "rpn_nms_thresh": 0.5}
    model, images = build(**options), photographs()
    assert model.config.num_detections == 40
    expected, output = twin_of(model, **options)(images), model(**inputs_of(images))
    assert output.logits.shape == (3, 40, tiny.NUM_CLASSES + 1) and output.pred_boxes.shape == (3, 40, 4)
    assert min(len(own["scores"]) for own in expected) < 40
    assert_same_detections(output, expected, SIZES)


@functools.cache
def frozen_weights() -> dict[str, Tensor]:
    """Weights as torchvision downloads them: of a detector with frozen BatchNorm and COCO's numbers of categories."""
    numbers = [str(number) for number in range(90)]
    model = FasterRCNNForObjectDetection(config(RESNET, numbers))
    randomise(model)
    return {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}


@torch.no_grad()
@pytest.mark.parametrize("name", ["DEFAULT", "FasterRCNN_ResNet50_FPN_Weights.COCO_V1"])
def test_trained_weights_with_frozen_batch_norm_detect_alike_and_survive_a_file(name, monkeypatch, tmp_path):
    weights = frozen_weights()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: weights)
    model = FasterRCNNForObjectDetection.from_torchvision(RESNET, name, **OPTIONS)
    twin = torchvision.models.get_model(RESNET, weights="DEFAULT", **OPTIONS, **TRANSFORM).eval()
    assert not model.training and model.config.frozen_batch_norm and model.config.batch_norm_eps == 0.0
    assert (
        model.config.num_labels == 90
        and model.config.id2label[0] == "person"
        and model.config.id2label[89] == ("toothbrush")
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    images = photographs(SIZES[:1])
    expected = twin(images)
    for one in (model, loaded):
        assert one.state_dict().keys() == weights.keys()
        frozen = [module for module in one.modules() if isinstance(module, FrozenBatchNorm2d)]
        assert len(frozen) == 53 and all(module.eps == 0.0 for module in frozen)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in one.modules())
        assert_same_detections(one(**inputs_of(images)), expected, SIZES[:1])


def test_random_weights_are_those_that_torchvision_starts_from():
    torch.manual_seed(1)
    expected = torchvision.models.get_model(MOBILENET, weights=None, weights_backbone=None, num_classes=6)
    torch.manual_seed(1)
    model = AutoModelForObjectDetection.from_config(config(MOBILENET))
    assert type(model) is FasterRCNNForObjectDetection
    found = model.state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name], value), name


@torch.no_grad()
def test_a_state_dict_brings_its_classes_and_its_weights():
    source, images = build(MOBILENET), photographs()
    model = FasterRCNNForObjectDetection.from_torchvision(MOBILENET, source.state_dict(), **OPTIONS)
    assert model.config.num_labels == tiny.NUM_CLASSES and not model.config.frozen_batch_norm
    assert_same_detections(model(**inputs_of(images)), twin_of(source)(images), SIZES)


@torch.no_grad()
def test_a_state_dict_of_frozen_batch_norm_stays_frozen():
    for options, eps in (({}, 1e-5), ({"batch_norm_eps": 0.0}, 0.0)):  # which a state dict does not tell
        model = FasterRCNNForObjectDetection.from_torchvision(RESNET, frozen_weights(), **options)
        assert model.config.frozen_batch_norm and model.config.batch_norm_eps == eps
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert {module.eps for module in model.modules() if isinstance(module, FrozenBatchNorm2d)} == {eps}


def test_frozen_batch_norm_behind_a_timm_backbone_does_not_follow_the_data():
    own = config()
    own.frozen_batch_norm, own.batch_norm_eps = True, 1e-3
    model = FasterRCNNForObjectDetection(own)
    model.load_state_dict(build().state_dict())
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert len(before) == 4 * sum(isinstance(module, nn.BatchNorm2d) for module in build().modules()) > 0
    model.train()(**inputs_of(photographs()), labels=border_labels()).loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert all(module.eps == 1e-3 for module in model.modules() if isinstance(module, FrozenBatchNorm2d))


@pytest.mark.parametrize("name", [RESNET, MOBILENET, SMALL])
@torch.no_grad()
def test_a_config_knows_the_widths_of_the_model_it_builds(name):
    model = build(name)
    encoded = model.encode(torch.randn(1, 3, 64, 64))
    pooled = model.roi_heads.box_roi_pool.featmap_names
    levels = [encoded.pyramid[level] for level in pooled if level in encoded.pyramid]
    assert tuple(level.shape[1] for level in levels) == model.config.level_widths
    assert len(encoded.pyramid) == len(levels) + 1
    answer = model.answer(encoded, [torch.tensor([[3.0, 5.0, 30.0, 40.0]])])
    assert answer.states.shape == (1, model.config.hidden_size)
    assert model.roi_heads.detections_per_img == model.config.num_detections == 100
    assert model(torch.randn(1, 3, 64, 64)).logits.shape == (1, 100, tiny.NUM_CLASSES + 1)
