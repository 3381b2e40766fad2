"""Faster R-CNN as one graph with a dynamic batch size.

Its own `detect`, and torchvision's steps in it, loop over lists of images and detections, whose lengths a graph would
fix to those of the traced images. Here all images take the same path: rows that a step discards are kept with a score
of `OUT`, so that the size of every tensor except the NMS candidates is independent of the images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, nms, roi_align

from ..models.faster_rcnn.modeling_faster_rcnn import NOTHING, STRIDE, FasterRCNNForObjectDetection, to_unit


OUT = -1.0
SMALLEST = 1e-2  # of a detection, in pixels, as in torchvision's `postprocess_detections`


class RegionHeads(nn.Module):
    """A Faster R-CNN in eval mode as a function of images of one size, with the same logits and boxes as the model.

    Args:
        model ([`FasterRCNNForObjectDetection`]): must have processed an image, so that its pooler knows the strides.
    """

    def __init__(self, model: FasterRCNNForObjectDetection):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(batch_size, num_detections, num_labels + 1)`, no-object last, and boxes, cxcywh in [0, 1], of
        images `(batch_size, 3, height, width)`."""
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        canvas = F.pad(pixel_values, (0, -size[1] % STRIDE, 0, -size[0] % STRIDE))
        pyramid = {level: values.float() for level, values in self.model.backbone(canvas).items()}
        proposals, proposed = self.propose(canvas, pyramid, size)
        boxes, scores, classes = self.answer(pyramid, proposals, proposed, size)
        return self.heads(boxes, scores, classes, size)

    def propose(self, canvas: Tensor, pyramid: dict[str, Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Proposals `(batch_size, num_proposals, 4)`, xyxy in pixels, and a mask of the valid ones."""
        rpn, maps = self.model.rpn, list(pyramid.values())
        answers, deltas = rpn.head(maps)
        counts = [answer.shape[1] * answer.shape[2] * answer.shape[3] for answer in answers]
        (anchors,) = rpn.anchor_generator(ImageList(canvas[:1], [size]), maps)
        joined, moves = concat_box_prediction_layers(answers, deltas)
        objectness, moves = joined.reshape(-1, len(anchors)), moves.reshape(-1, len(anchors), 4)
        rows: list[Tensor] = []
        levels: list[Tensor] = []
        start = 0
        for level, count in enumerate(counts):
            best = objectness[:, start : start + count].topk(min(rpn.pre_nms_top_n(), count)).indices
            rows, levels = [*rows, best + start], [*levels, torch.full_like(best, level)]
            start += count
        row = torch.cat(rows, 1)
        boxes = rpn.box_coder.decode_single(_taken(moves, row).flatten(0, 1), anchors[row].flatten(0, 1))
        boxes = clip_boxes_to_image(boxes.reshape(*row.shape, 4), size)
        scores = objectness.gather(1, row).sigmoid()
        valid = _large(boxes, rpn.min_size) & (scores >= rpn.score_thresh)
        scores = torch.where(valid, scores, OUT)
        best, kept = distinct(boxes, scores, torch.cat(levels, 1), rpn.nms_thresh, rpn.post_nms_top_n(), size)
        return _taken(boxes, kept), best > OUT

    def answer(
        self, pyramid: dict[str, Tensor], proposals: Tensor, proposed: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best detections: boxes `(batch_size, num_detections, 4)`, xyxy in pixels, scores, and classes."""
        roi = self.model.roi_heads
        logits, deltas = roi.box_predictor(roi.box_head(self.pooled(pyramid, proposals)))
        batch, count, num_labels = proposals.shape[0], proposals.shape[1], self.model.config.num_labels
        boxes = roi.box_coder.decode_single(deltas.float(), proposals.flatten(0, 1))
        boxes = clip_boxes_to_image(boxes.reshape(batch, count, num_labels + 1, 4)[:, :, 1:], size).flatten(1, 2)
        scores = logits.float().softmax(-1).reshape(batch, count, num_labels + 1)[..., 1:].flatten(1)
        classes = torch.arange(num_labels, device=boxes.device).repeat(count).expand(batch, -1)
        there = proposed[..., None].expand(-1, -1, num_labels).flatten(1)
        valid = there & (scores > roi.score_thresh) & _large(boxes, SMALLEST)
        scores = torch.where(valid, scores, OUT)
        best, kept = distinct(boxes, scores, classes, roi.nms_thresh, roi.detections_per_img, size)
        return _taken(boxes, kept), best, classes.gather(1, kept)

    def pooled(self, pyramid: dict[str, Tensor], proposals: Tensor) -> Tensor:
        """Pooled features of each proposal, `(batch_size * num_proposals, channels, height, width)`."""
        pooler = self.model.roi_heads.box_roi_pool
        boxes = proposals.flatten(0, 1)
        images = torch.arange(proposals.shape[0], device=boxes.device)[:, None].expand(*proposals.shape[:2]).flatten()
        regions = torch.cat([images[:, None].to(boxes), boxes], 1)
        maps = [pyramid[name] for name in pooler.featmap_names]
        if len(maps) == 1:
            return roi_align(maps[0], regions, pooler.output_size, pooler.scales[0], pooler.sampling_ratio)
        levels = pooler.map_levels([boxes])
        pooled = boxes.new_zeros(boxes.shape[0], maps[0].shape[1], *pooler.output_size)
        for level, (values, scale) in enumerate(zip(maps, pooler.scales, strict=True)):
            row = (levels == level).nonzero().squeeze(1)
            part = roi_align(values, regions[row], pooler.output_size, scale, pooler.sampling_ratio)
            pooled = pooled.index_copy(0, row, part)
        return pooled

    def heads(self, boxes: Tensor, scores: Tensor, classes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Detections as in `FasterRCNNOutput`, padded to the maximum number per image."""
        real = scores > OUT
        labels = torch.arange(self.model.config.num_labels, device=classes.device)
        known = (classes[..., None] == labels) & real[..., None]
        likely = scores.clamp(min=1e-30, max=1 - 1e-7)
        logits = torch.where(known, likely.log()[..., None], NOTHING)
        nothing = torch.where(real, torch.log1p(-likely), 0.0)
        missing = self.model.roi_heads.detections_per_img - scores.shape[1]
        logits = F.pad(torch.cat([logits, nothing[..., None]], -1), (0, 0, 0, missing), value=NOTHING)
        last = F.pad(nothing, (0, missing))[..., None]
        frames = torch.where(real[..., None], to_unit(boxes, size), 0.0)
        return torch.cat([logits[..., :-1], last], -1), F.pad(frames, (0, 0, 0, missing))


def distinct(
    boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, count: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """NMS within each image and group: scores of the `count` best remaining boxes (`OUT` if there are fewer), and
    their rows. One call handles all images: boxes are shifted apart, groups to the right and images down."""
    batch, total = scores.shape
    image = torch.arange(batch, device=boxes.device)[:, None].expand(-1, total)
    shift = torch.stack([groups * (size[1] + 1), image * (size[0] + 1)], -1).to(boxes)
    apart = (boxes + shift.repeat(1, 1, 2)).flatten(0, 1)
    flat = scores.flatten()
    candidates = (flat > OUT).nonzero().squeeze(1)
    left = candidates[nms(apart[candidates], flat[candidates], threshold)]
    chosen = torch.zeros_like(flat).index_fill(0, left, 1.0)
    best, rows = torch.where(chosen > 0, flat, OUT).reshape(batch, total).topk(min(count, total))
    return best, rows


def _taken(values: Tensor, rows: Tensor) -> Tensor:
    """Rows of each image, `(batch_size, num_rows, channels)`."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))


def _large(boxes: Tensor, least: float) -> Tensor:
    """Mask of the boxes, xyxy, that are at least `least` wide and high."""
    return (boxes[..., 2:] - boxes[..., :2]).amin(-1) >= least
