"""Faster R-CNN behind transformers' interface against torchvision's own: losses, detections, figures, files."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models._api import WeightsEnum
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import AnchorGenerator, FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, MultiScaleRoIAlign, box_area, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers import AutoModelForObjectDetection, DetrImageProcessor, pipeline

from hf_detrkd.evaluation import CocoBoxMetric, detections_from_predictions, predictions_from_heads
from hf_detrkd.models import FasterRCNNConfig, FasterRCNNForObjectDetection
from tests import tiny
from tests.models.apart import answers_apart


RESNET, RESNET_V2 = "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"
MOBILENET = "fasterrcnn_mobilenet_v3_large_320_fpn"
SMALL = "timm"
CHANNELS = (16, 24, 32, 48)
ANCHORS = (8, 16, 32, 64, 128)
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
SIZES = ((64, 96), (96, 64), (64, 70))
"""Of images that torchvision's transform leaves as they are; together they are padded to 96 x 96."""
OPTIONS = {"box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 60}
"""Few proposals, of which every box counts as a detection."""
TRANSFORM = {"min_size": 64, "max_size": 96, "_skip_resize": True}
"""For torchvision: images of [`SIZES`] as they are, and no random number drawn for their size in training."""


# --- models, and torchvision's own with the same weights -------------------------------------------------------------


def config(name: str = SMALL, labels: Sequence[str] = tiny.LABELS, **options: Any) -> FasterRCNNConfig:
    """Of one of torchvision's detectors, or of a small one behind a timm backbone."""
    classes = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    options = OPTIONS | options
    if name != SMALL:
        return FasterRCNNConfig(torchvision_name=name, options=options, **classes)
    return FasterRCNNConfig(
        backbone="resnet18",
        backbone_kwargs={"channels": list(CHANNELS)},
        fpn_channels=32,
        representation_size=64,
        anchor_sizes=list(ANCHORS),
        options=options,
        **classes,
    )


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """BatchNorm near the statistics of images, with none at 0 or 1, and heads whose answers differ from box to box."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(std=0.1)
    model.backbone.train()(torch.randn(2, 3, 96, 96))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_mean.add_(0.1 * torch.randn_like(norm.running_mean))
        norm.running_var.mul_(torch.rand_like(norm.running_var) + 0.5)
        norm.num_batches_tracked.zero_()
    head, predictor = model.eval().rpn.head, model.roi_heads.box_predictor
    spreads = {head.cls_logits: 2.0, head.bbox_pred: 0.3, predictor.cls_score: 1.5}
    seen: dict[nn.Module, list[Tensor]] = {layer: [] for layer in spreads}
    handles = [layer.register_forward_hook(lambda own, args, output: seen[own].append(output)) for layer in spreads]
    model(torch.randn(2, 3, 96, 96))
    for layer, handle in zip(spreads, handles, strict=True):
        handle.remove()
        answers = torch.cat([output.transpose(0, 1).flatten(1) for output in seen[layer]], 1)
        scale = spreads[layer] / answers.std(1)
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.sub_(answers.mean(1)).mul_(scale)


@functools.cache
def weights_of(name: str) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FasterRCNNForObjectDetection(config(name))
        randomise(model)
    return model.state_dict()


def build(name: str = SMALL, **options: Any) -> FasterRCNNForObjectDetection:
    """A random detector, always with the same weights, in eval mode."""
    model = FasterRCNNForObjectDetection(config(name, **options))
    model.load_state_dict(weights_of(name))
    return model.eval()


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4), channels=CHANNELS)
        self.fpn = FeaturePyramidNetwork(CHANNELS, 32, LastLevelMaxPool())
        self.out_channels = 32

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict(zip("0123", self.body(images), strict=True)))


def twin_of(model: FasterRCNNForObjectDetection, **options: Any) -> FasterRCNN:
    """torchvision's own detector, made without the package, with the same weights."""
    options, num_classes = OPTIONS | options | TRANSFORM, tiny.NUM_CLASSES + 1
    if model.config.backbone is None:
        name = model.config.torchvision_name
        twin = torchvision.models.get_model(
            name, weights=None, weights_backbone=None, num_classes=num_classes, **options
        )
    else:
        twin = FasterRCNN(
            Pyramid(),
            rpn_anchor_generator=AnchorGenerator(tuple((size,) for size in ANCHORS), ((0.5, 1.0, 2.0),) * 5),
            box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
            box_head=TwoMLPHead(32 * 7 * 7, 64),
            box_predictor=FastRCNNPredictor(64, num_classes),
            **options,
        )
    twin.load_state_dict(model.state_dict())
    return twin.eval()


# --- a batch in the words of both ------------------------------------------------------------------------------------


def photographs(sizes: Sequence[tuple[int, int]] = SIZES, seed: int = 0) -> list[Tensor]:
    """Random images in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def inputs_of(images: Sequence[Tensor], masked: bool = True) -> dict[str, Tensor]:
    """Normalised and padded, as a DETR image processor does it."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pixels, mask = torch.zeros(len(images), 3, height, width), torch.zeros(len(images), height, width).long()
    for row, image in enumerate(images):
        pixels[row, :, : image.shape[1], : image.shape[2]] = (image - MEAN) / STD
        mask[row, : image.shape[1], : image.shape[2]] = 1
    return {"pixel_values": pixels} | ({"pixel_mask": mask} if masked else {})


def labels_of(*boxes: Sequence[Sequence[float]]) -> list[dict[str, Tensor]]:
    """DETR's labels from cxcywh in [0, 1]; classes follow each other."""
    return [
        {"boxes": torch.tensor(rows).reshape(-1, 4), "class_labels": torch.arange(len(rows)) % tiny.NUM_CLASSES}
        for rows in boxes
    ]


def border_labels() -> list[dict[str, Tensor]]:
    """Boxes of three images that touch borders and corners, and some that do not."""
    return labels_of(
        [(0.15, 0.2, 0.3, 0.4), (0.9, 0.85, 0.2, 0.3), (0.51, 0.47, 0.33, 0.52)],
        [(0.5, 0.5, 1.0, 1.0), (0.97, 0.31, 0.06, 0.23)],
        [(0.37, 0.05, 0.41, 0.1), (0.62, 0.58, 0.21, 0.37), (0.05, 0.95, 0.1, 0.1)],
    )


def corners(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """xyxy in pixels of cxcywh in [0, 1]."""
    height, width = size
    return box_convert(boxes, "cxcywh", "xyxy") * torch.tensor([width, height, width, height])


def torchvision_targets(labels: Sequence[dict[str, Tensor]], sizes: Sequence[Any]) -> list[dict[str, Tensor]]:
    """The same in torchvision's words."""
    return [
        {"boxes": corners(label["boxes"], size), "labels": label["class_labels"] + 1}
        for label, size in zip(labels, sizes, strict=True)
    ]


def assert_same_detections(output: Any, expected: Sequence[dict[str, Tensor]], sizes: Sequence[Sequence[int]]) -> None:
    """The same boxes in the same order, classes and scores; what is filled up has no score."""
    scores, labels = output.logits.softmax(-1)[..., :-1].max(-1)
    for row, (own, size) in enumerate(zip(expected, sizes, strict=True)):
        count, (height, width) = len(own["scores"]), size
        assert count
        assert not scores[row, count:].any()
        assert torch.equal(labels[row, :count], own["labels"] - 1)
        torch.testing.assert_close(scores[row, :count], own["scores"], atol=1e-5, rtol=0)
        boxes = box_convert(own["boxes"] / torch.tensor([width, height, width, height]), "xyxy", "cxcywh")
        torch.testing.assert_close(output.pred_boxes[row, :count], boxes, atol=1e-5, rtol=0)


# --- the same as torchvision -----------------------------------------------------------------------------------------


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
    for key, value in twin.state_dict().items():  # statistics of BatchNorm moved alike
        torch.testing.assert_close(model.state_dict()[key], value, atol=1e-5, rtol=1e-5)


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
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


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


# --- what users of transformers and COCO see -------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6])
@torch.no_grad()
def test_the_image_processor_finds_the_detector_s_own_boxes_and_no_others(threshold):
    model, images = build(), photographs()
    original = [(2 * height, 3 * width) for height, width in SIZES]
    found = DetrImageProcessor().post_process_object_detection(model(**inputs_of(images)), threshold, original)
    for image, own in zip(found, twin_of(model)(images), strict=True):
        above = own["scores"] > threshold
        assert above.any() and (threshold < 0.3 or not above.all())
        assert torch.equal(image["labels"], own["labels"][above] - 1)
        torch.testing.assert_close(image["scores"], own["scores"][above], atol=1e-5, rtol=0)
        torch.testing.assert_close(image["boxes"], own["boxes"][above] * torch.tensor([3, 2, 3, 2]), atol=1e-3, rtol=0)


@torch.no_grad()
def test_the_pipeline_finds_the_detector_s_own_boxes_and_no_others():
    model = build()
    processor = DetrImageProcessor(size={"height": 64, "width": 96}, do_pad=False)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    found = pipeline("object-detection", model=model, image_processor=processor)(picture, threshold=0.4)
    (own,) = twin_of(model)([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255])
    above = own["scores"] > 0.4
    assert 2 < above.sum() < len(above) and len(found) == above.sum()
    for one, box, label, score in zip(found, *(own[key][above] for key in ("boxes", "labels", "scores")), strict=True):
        assert one["label"] == tiny.LABELS[label - 1]
        assert one["score"] == pytest.approx(score.item(), abs=1e-4)
        place = torch.tensor([one["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")])
        assert (place - box).abs().max() <= 1  # which the pipeline rounds down


def truth_near(detections: Sequence[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Ground truth of each image: some detections moved a little, some of another class, some anywhere."""
    generator, truth = torch.Generator().manual_seed(0), []
    for number, own in enumerate(detections):
        boxes, labels = own["boxes"][:30:2].clone(), own["labels"][:30:2] - 1
        boxes += 0.5 * torch.randn(boxes.shape, generator=generator)
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 2)
        labels[::5] = (labels[::5] + 1) % tiny.NUM_CLASSES
        anywhere = corners(tiny.random_boxes(3, generator=generator), (64, 64))
        boxes, labels = torch.cat([boxes, anywhere]), torch.cat([labels, torch.arange(3)])
        row = {"image_id": number, "boxes": boxes, "labels": labels, "area": box_area(boxes)}
        truth.append({key: value.tolist() if isinstance(value, Tensor) else value for key, value in row.items()})
        truth[-1]["iscrowd"] = [0] * len(boxes)
    return truth


@pytest.mark.parametrize("threshold", [0.0, 0.4])
@torch.no_grad()
def test_average_precision_is_that_of_torchvision_s_own_detections(threshold):
    images = [image for seed in range(2) for image in photographs(seed=seed)]
    sizes = [image.shape[1:] for image in images]
    model = build(box_score_thresh=threshold)
    detections = twin_of(model, box_score_thresh=threshold)(images)
    output = model(**inputs_of(images))
    assert threshold == 0.0 or any(len(own["scores"]) < 100 for own in detections)
    predictions = predictions_from_heads(output.logits, output.pred_boxes, model.config.num_labels)
    raw = [{**own, "labels": own["labels"] - 1} for own in detections]
    figures = []
    for answers in (raw, detections_from_predictions(predictions, torch.tensor(sizes))):
        metric = CocoBoxMetric(model.config.id2label)
        rows = [
            {"image_id": number, **{key: own[key].tolist() for key in ("boxes", "labels", "scores")}}
            for number, own in enumerate(answers)
        ]
        metric.add_batch(predictions=rows, references=truth_near(detections))
        figures.append(metric.compute())
    assert figures[1] == pytest.approx(figures[0], abs=1e-6)
    assert 0.05 < figures[0]["map"] < 0.95


# --- what a model must survive ---------------------------------------------------------------------------------------


NO_PROPOSALS = {"rpn_score_thresh": 1.01}
EDGES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "an image without boxes": ({}, SIZES[:2], labels_of([(0.5, 0.5, 0.4, 0.4)], [])),
    "no box at all": ({}, SIZES[:2], labels_of([], [])),
    "no proposal": (NO_PROPOSALS, SIZES[:2], labels_of([(0.5, 0.5, 0.4, 0.4)], [(0.3, 0.3, 0.2, 0.2)])),
    "no proposal and no box": (NO_PROPOSALS, SIZES[:2], labels_of([], [])),
    "boxes of one pixel": (
        {},
        SIZES[:2],
        labels_of([(0.5, 0.5, 1 / 96, 1 / 64)], [(1 - 0.5 / 64, 0.5 / 96, 1 / 64, 1 / 96)]),
    ),
    "an image smaller than the stride": ({}, [(20, 27), (24, 17)], labels_of([(0.5, 0.5, 0.4, 0.4)], [])),
}


@pytest.mark.parametrize("edge", EDGES)
def test_losses_gradients_and_detections_stay_finite_with(edge):
    options, sizes, labels = EDGES[edge]
    model, inputs = build(**options), inputs_of(photographs(sizes))
    for training in (True, False):
        model.train(training).zero_grad()
        output = model(**inputs, labels=labels)
        assert all(value.isfinite() for value in output.loss_dict.values())
        output.loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert output.loss_dict["objectness"] > 0 and model.rpn.head.cls_logits.weight.grad.any()
    scores = output.logits.softmax(-1)[..., :-1]
    assert scores.isfinite().all() and output.pred_boxes.isfinite().all()
    assert scores.any() != edge.startswith("no proposal")
    assert output.pred_boxes[scores.amax(-1) > 0].ge(-1e-6).all() and output.pred_boxes.le(1 + 1e-6).all()


def test_losses_of_no_sample_are_zero_and_keep_the_graph():
    options, sizes, labels = EDGES["no proposal and no box"]
    model = build(**options).train()
    losses = model(**inputs_of(photographs(sizes)), labels=labels).loss_dict
    for part in ("classifier", "box_reg"):
        model.zero_grad()
        assert losses[part].item() == 0
        losses[part].backward(retain_graph=True)
        head = "cls_score" if part == "classifier" else "bbox_pred"
        gradient = model.roi_heads.box_predictor.get_submodule(head).weight.grad
        assert gradient is not None and not gradient.any()


def test_training_without_labels_is_refused():
    model = build().train()
    with pytest.raises(ValueError, match=r"in training mode needs labels: give them, or call eval\(\) to detect"):
        model(**inputs_of(photographs()))


@torch.no_grad()
def test_evaluation_with_labels_gives_loss_and_detections():
    model, inputs = build(), inputs_of(photographs())
    output, alone = model(**inputs, labels=border_labels()), model(**inputs)
    torch.testing.assert_close(output.loss, sum(output.loss_dict.values()))
    assert len(output.loss_dict) == 4 and output.loss > 0
    assert torch.equal(output.logits, alone.logits) and torch.equal(output.pred_boxes, alone.pred_boxes)
    assert len(model(**inputs, labels=border_labels()).to_tuple()) == 4
    logits, boxes = model(**inputs, return_dict=False)
    assert torch.equal(logits, alone.logits) and torch.equal(boxes, alone.pred_boxes)


# --- files, precision, config ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_model_is_the_same_here_and_where_the_package_is_not(tmp_path):
    model, inputs = build(), inputs_of(photographs())
    model.save_pretrained(tmp_path / "saved")
    expected = model(**inputs)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path / "saved")
    assert type(loaded) is FasterRCNNForObjectDetection and not loaded.training
    assert loaded.config.to_dict() == {**model.config.to_dict(), **changed_by_saving(loaded)}
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    output = loaded(**inputs)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.pred_boxes, expected.pred_boxes)

    logits, boxes = answers_apart(tmp_path, inputs)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(boxes, expected.pred_boxes)


def changed_by_saving(model: FasterRCNNForObjectDetection) -> dict[str, Any]:
    return {key: model.config.to_dict()[key] for key in ("_name_or_path", "architectures", "auto_map", "dtype")}


@torch.no_grad()
def test_under_bf16_autocast_most_boxes_stay_within_a_pixel():
    model, inputs = build(rpn_post_nms_top_n_test=1000), inputs_of(photographs([(480, 640)]))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            encoded = model.encode(**inputs)
            (proposals,) = model.propose(encoded)[0]
            _, boxes = model.detect(encoded, [proposals])
        assert proposals.dtype == boxes.dtype == torch.float32
        found.append((proposals, corners(boxes[0], (480, 640))))
    for exact, rounded in zip(*found, strict=True):
        nearest = (exact[:100, None] - rounded).abs().amax(-1).amin(1)
        assert exact.abs().max() > 400
        assert (nearest < 1).float().mean() > 0.8, nearest.sort().values
    assert not torch.equal(*(proposals for proposals, _ in found))  # autocast did something


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_weights_of_sixteen_bits_leave_proposals_and_heads_in_float32(tmp_path, dtype):
    source, images = build(box_score_thresh=0.05), photographs()
    source.save_pretrained(tmp_path)
    model = AutoModelForObjectDetection.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.backbone.parameters()} == {dtype}
    assert {p.dtype for p in (*model.rpn.parameters(), *model.roi_heads.parameters())} == {torch.float32}
    inputs = inputs_of(images)
    found = model(**inputs | {"pixel_values": inputs["pixel_values"].to(dtype)})
    assert found.logits.dtype == found.pred_boxes.dtype == torch.float32 and found.logits.isfinite().all()
