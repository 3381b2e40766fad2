"""Faster R-CNN of ours, torchvision's own with the same weights, and a batch in the words of both."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import AnchorGenerator, FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from hf_detrkd.models import FasterRCNNConfig, FasterRCNNForObjectDetection
from tests import tiny


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
NO_PROPOSALS = {"rpn_score_thresh": 1.01}


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
