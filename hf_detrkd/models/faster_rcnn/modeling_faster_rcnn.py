"""torchvision's Faster R-CNN with transformers' interface: images, labels and predictions in the format of DETR.

Depends only on transformers, torch, torchvision and timm, because the file is copied into saved models.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import AnchorGenerator, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, box_convert, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_faster_rcnn import FasterRCNNConfig


STRIDE = 32  # torchvision pads images to a multiple of this
NOTHING = -1e4  # logit of the classes that a detection does not have


@dataclass
class FasterRCNNOutput(ModelOutput):
    """Output of [`FasterRCNNForObjectDetection`].

    Attributes:
        loss (`torch.Tensor`, *optional*): sum of `loss_dict`, if labels are given.
        loss_dict (`dict`, *optional*): `classifier`, `box_reg`, `objectness`, `rpn_box_reg`.
        logits (`torch.Tensor` of shape `(batch_size, num_detections, num_labels + 1)`): logarithms of the scores after
            NMS, no-object last: the softmax is a detection's score at its label, and the rest at no-object. Images
            with fewer detections are padded with no-object.
        pred_boxes (`torch.Tensor` of shape `(batch_size, num_detections, 4)`): cxcywh in [0, 1] of the image.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None


@dataclass(frozen=True)
class Encoded:
    """An encoded batch: the padded images with their sizes in pixels, and the feature pyramid."""

    images: ImageList
    pyramid: dict[str, Tensor]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return self.images.image_sizes


@dataclass(frozen=True)
class Answer:
    """Output of the box head for boxes, concatenated over images.

    Attributes:
        states (`torch.Tensor` of shape `(num_boxes, hidden_size)`)
        logits (`torch.Tensor` of shape `(num_boxes, 1 + num_labels)`): background first, as in torchvision.
        deltas (`torch.Tensor` of shape `(num_boxes, 4 * (1 + num_labels))`)
    """

    states: Tensor
    logits: Tensor
    deltas: Tensor


@dataclass(frozen=True)
class Samples:
    """Sampled boxes of a training step, one tensor per image: boxes in pixels, torchvision labels (0 for background),
    the ground-truth box matched to each, and the output of the box head."""

    boxes: list[Tensor]
    labels: list[Tensor]
    matched: list[Tensor]
    answer: Answer


class FasterRCNNForObjectDetection(PreTrainedModel):
    """Faster R-CNN with a feature pyramid. Its weights have torchvision's names.

    It expects images in the format of DETR's image processor: normalised, and padded with a `pixel_mask` if sizes
    differ. In eval mode it returns detections; in training mode it needs labels and returns only the loss.
    """

    config: FasterRCNNConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""
    _auto_class = "AutoModelForObjectDetection"  # saved models include this code
    input_modalities = ("image",)
    _keep_in_fp32_modules_strict = ["rpn", "roi_heads"]  # 16 bits would round boxes to several pixels

    def __init__(self, config: FasterRCNNConfig):
        super().__init__(config)
        detector = build_detector(config)
        self.backbone, self.rpn, self.roi_heads = detector.backbone, detector.rpn, detector.roi_heads
        if not any(parameter.is_meta for parameter in self.parameters()):
            for module in self.modules():
                module._is_hf_initialized = True  # torchvision and timm have initialised them
        self.post_init()

    @classmethod
    def from_torchvision(
        cls,
        name: str = "fasterrcnn_resnet50_fpn",
        weights: Any = None,
        batch_norm_eps: float | None = None,
        **options: Any,
    ) -> "FasterRCNNForObjectDetection":
        """Converts a torchvision detector; the detections are the same.

        Args:
            name (`str`): name of torchvision's builder.
            weights (`str`, a torchvision weights enum, or a state dict, *optional*): `"DEFAULT"` downloads the best
                weights; `None` gives random weights for COCO's 90 category ids.
            batch_norm_eps (`float`, *optional*): epsilon of frozen BatchNorm layers, which a state dict does not
                contain. Default: torchvision's, 1e-5 for a state dict.
            options: arguments of torchvision's `FasterRCNN`.
        """
        own = weights if isinstance(weights, Mapping) else None
        classes = {} if own is None else {"num_classes": len(own["roi_heads.box_predictor.cls_score.weight"])}
        detector = torchvision.models.get_model(
            name, weights=None if own is not None else weights, weights_backbone=None, **classes, **options
        )
        frozen = {module.eps for module in detector.modules() if isinstance(module, FrozenBatchNorm2d)}
        if own is not None and not any(key.endswith("num_batches_tracked") for key in own):
            frozen = {1e-5}
        num_labels = detector.roi_heads.box_predictor.cls_score.out_features - 1
        names = [f"LABEL_{index}" for index in range(num_labels)]
        if own is None and weights is not None:
            names = torchvision.models.get_model_weights(name).verify(weights).meta["categories"][1:]
        config = FasterRCNNConfig(
            torchvision_name=name,
            options=options or None,
            frozen_batch_norm=bool(frozen),
            batch_norm_eps=min(frozen, default=None) if batch_norm_eps is None else batch_norm_eps,
            id2label=dict(enumerate(names)),
            label2id={label: index for index, label in enumerate(names)},
        )
        model = cls(config)
        model.load_state_dict(detector.state_dict() if own is None else own)
        return model.eval()

    # --- steps of a forward pass ----------------------------------------------------------------------------------

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Encoded:
        """Computes the feature pyramid of a batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`)
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*): 1 where a pixel is real.
        """
        height, width = pixel_values.shape[-2:]
        sizes = [(height, width)] * len(pixel_values)
        if pixel_mask is not None:
            real = pixel_mask.bool()
            sizes = torch.stack([real.any(2).sum(1), real.any(1).sum(1)], 1).tolist()
        canvas = F.pad(pixel_values, (0, -width % STRIDE, 0, -height % STRIDE))
        pyramid = {level: values.float() for level, values in self.backbone(canvas).items()}
        return Encoded(ImageList(canvas, [(h, w) for h, w in sizes]), pyramid)

    def propose(self, encoded: Encoded, targets: list[dict[str, Tensor]] | None = None) -> tuple[list[Tensor], dict]:
        """Proposals of each image in pixels, xyxy, best first. With targets their number is that of training, and the
        losses `loss_objectness` and `loss_rpn_box_reg` are returned too. In float32: 16 bits would round anchors to
        several pixels."""
        device_type = encoded.images.tensors.device.type
        with torch.autocast(device_type, enabled=False), in_mode(self.rpn, targets is not None):
            return self.rpn(encoded.images, encoded.pyramid, targets)

    def answer(self, encoded: Encoded, boxes: list[Tensor]) -> Answer:
        """Runs the box head on boxes in pixels, xyxy, one tensor per image."""
        canvas = [tuple(encoded.images.tensors.shape[-2:])] * len(boxes)  # padded size, for the pyramid's strides
        states = self.roi_heads.box_head(self.roi_heads.box_roi_pool(encoded.pyramid, boxes, canvas))
        logits, deltas = self.roi_heads.box_predictor(states)
        return Answer(states, logits.float(), deltas.float())

    def boxes_of(self, answer: Answer, boxes: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Predicted boxes for each class without background, `(num_boxes, num_labels, 4)` per image: xyxy in pixels,
        clipped to the image."""
        moved = self.roi_heads.box_coder.decode(answer.deltas, boxes)
        moved = moved.reshape(len(answer.deltas), self.config.num_labels + 1, 4)[:, 1:]  # also for 0 boxes
        parts = moved.split([len(one) for one in boxes])
        return [clip_boxes_to_image(part, size) for part, size in zip(parts, sizes, strict=True)]

    def learn(self, encoded: Encoded, labels: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Samples]:
        """Computes the four losses, and the samples that the two losses of the box head use."""
        targets = to_torchvision(labels, encoded.sizes)
        proposals, losses = self.propose(encoded, targets)
        boxes, indices, classes, deltas = self.roi_heads.select_training_samples(proposals, targets)
        answer = self.answer(encoded, boxes)
        nothing = answer.logits.sum() * 0 + answer.deltas.sum() * 0
        classifier, box_reg = nothing, nothing
        if len(answer.logits):
            classifier, box_reg = fastrcnn_loss(answer.logits, answer.deltas, classes, deltas)
        found = {name.removeprefix("loss_"): value for name, value in losses.items()}
        matched = [
            target["boxes"][index] if len(target["boxes"]) else torch.zeros_like(box)
            for target, index, box in zip(targets, indices, boxes, strict=True)
        ]
        return {"classifier": classifier, "box_reg": box_reg} | found, Samples(boxes, classes, matched, answer)

    def detect(self, encoded: Encoded, proposals: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Detections after NMS: `logits` and `pred_boxes` as in [`FasterRCNNOutput`]."""
        proposals = self.propose(encoded)[0] if proposals is None else proposals
        answer = self.answer(encoded, proposals)
        found = self.roi_heads.postprocess_detections(answer.logits, answer.deltas, proposals, encoded.sizes)
        shape = len(proposals), self.roi_heads.detections_per_img
        logits = answer.logits.new_full((*shape, self.config.num_labels + 1), NOTHING)
        logits[..., -1] = 0.0
        boxes = torch.zeros(*shape, 4, device=logits.device)
        for row, (places, scores, classes) in enumerate(zip(*found, strict=True)):
            count = len(scores)
            logits[row, :count, -1] = torch.log1p(-scores.clamp(max=1 - 1e-7))
            logits[row, torch.arange(count), classes - 1] = scores.log()
            boxes[row, :count] = to_unit(places, encoded.sizes[row])
        return logits, boxes

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> FasterRCNNOutput | tuple:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`)
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*): 1 where a pixel is real.
            labels (`list[dict]`, *optional*): `class_labels`, and `boxes`, cxcywh in [0, 1] of the image.

        Raises:
            ValueError: training mode without labels.
        """
        if self.training and labels is None:
            raise ValueError("Faster R-CNN in training mode needs labels: give them, or call eval() to detect.")
        encoded = self.encode(pixel_values, pixel_mask)
        parts = None if labels is None else self.learn(encoded, labels)[0]
        logits, boxes = (None, None) if self.training else self.detect(encoded)
        loss = None if parts is None else torch.stack(list(parts.values())).sum()
        found = FasterRCNNOutput(loss=loss, loss_dict=parts, logits=logits, pred_boxes=boxes)
        return found if return_dict in (None, True) else found.to_tuple()


# --- parts -----------------------------------------------------------------------------------------------------------


class TimmPyramid(nn.Module):
    """timm backbone with torchvision's feature pyramid, with the same module names as torchvision's backbone."""

    def __init__(self, config: FasterRCNNConfig):
        super().__init__()
        import timm  # slow to import, and not needed for torchvision's backbones

        assert config.backbone is not None
        arguments: dict[str, Any] = {"features_only": True, "out_indices": (1, 2, 3, 4)} | (
            config.backbone_kwargs or {}
        )
        body: Any = timm.create_model(config.backbone, pretrained=False, **arguments)
        self.body, self.out_channels = body, config.fpn_channels
        channels = body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(channels, self.out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(level), values) for level, values in enumerate(self.body(images))))


def build_detector(config: FasterRCNNConfig) -> FasterRCNN:
    """Builds torchvision's detector of a config, with random weights."""
    options, num_classes = dict(config.options or {}), config.num_labels + 1
    if config.backbone is None:
        detector = torchvision.models.get_model(
            config.torchvision_name, weights=None, weights_backbone=None, num_classes=num_classes, **options
        )
    else:
        sizes = tuple((size,) for size in config.anchor_sizes)
        detector = FasterRCNN(
            TimmPyramid(config),
            rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
            box_head=TwoMLPHead(config.fpn_channels * 7**2, config.representation_size),
            box_predictor=FastRCNNPredictor(config.representation_size, num_classes),
            **options,
        )
    if config.frozen_batch_norm:
        from timm.layers import FrozenBatchNormAct2d
        from timm.utils.model import freeze_batch_norm_2d

        detector.backbone = freeze_batch_norm_2d(detector.backbone)
        for module in detector.backbone.modules():
            if config.batch_norm_eps is not None and isinstance(module, FrozenBatchNorm2d | FrozenBatchNormAct2d):
                module.eps = config.batch_norm_eps
    return detector


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Sets the module's `training` flag temporarily, not that of its children: it selects only proposal counts and
    losses."""
    before, module.training = module.training, training
    try:
        yield
    finally:
        module.training = before


def to_torchvision(labels: list[dict[str, Tensor]], sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Converts labels to torchvision's format: boxes in pixels, class 0 reserved for background. A box has at least
    one pixel: of one without extent the regression targets would be infinite."""
    targets = []
    for label, (height, width) in zip(labels, sizes, strict=True):
        center, extent = label["boxes"].float().split(2, -1)
        least = extent.new_tensor([1 / width, 1 / height])
        boxes = torch.cat([center, extent.maximum(least)], -1)
        targets.append({"labels": label["class_labels"] + 1, "boxes": to_pixels(boxes, (height, width))})
    return targets


def to_pixels(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Converts cxcywh in [0, 1] to xyxy in pixels."""
    height, width = size
    return box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([width, height, width, height])


def to_unit(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Converts xyxy in pixels to cxcywh in [0, 1]."""
    height, width = size
    return box_convert(boxes / boxes.new_tensor([width, height, width, height]), "xyxy", "cxcywh")


__all__ = ["FasterRCNNForObjectDetection", "FasterRCNNOutput"]
