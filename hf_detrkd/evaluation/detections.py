"""Converts predictions and labels to xyxy boxes in original-image pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_area, box_convert

from ..structures.outputs import Predictions


def detections_from_predictions(
    predictions: Predictions, sizes: Tensor | Sequence[tuple[int, int]], limit: int | None = None
) -> list[dict[str, Tensor]]:
    """The best detections of every image, best first, as in the image processors' post-processing.

    With sigmoid heads these are the best pairs of query and class (a query may appear twice), with softmax heads every
    query's best class. No threshold: average precision also needs detections of low score.

    Args:
        predictions ([`Predictions`]): predictions of the last decoder layer, boxes in [0, 1] of the image.
        sizes (`torch.Tensor` of shape `(batch_size, 2)`): height and width of the original images, in pixels.
        limit (`int`, *optional*): maximum number of detections per image, [`DetectorSpec.max_detections`] of a family.
            Default: as many as queries. COCO's limit of 100 is another: it holds for the detections of one class.

    Returns:
        `list[dict[str, torch.Tensor]]`: one per image, on the device of the predictions: `scores` and `labels` of
        shape `(num_detections,)`, `boxes` of shape `(num_detections, 4)`, corners in pixels. All images have the same
        number.
    """
    scores, num_classes = predictions.scores(), predictions.num_classes
    sizes = torch.as_tensor(sizes, device=scores.device)
    if sizes.shape != (len(scores), 2):
        raise ValueError(f"sizes must be (height, width) of {len(scores)} images, got shape {tuple(sizes.shape)}")
    limit = scores.shape[1] if limit is None else limit
    if predictions.activation == "softmax":
        scores, classes = scores.max(-1)
        scores, rows = scores.topk(min(limit, scores.shape[1]))
        classes = classes.gather(1, rows)
    else:
        scores, cells = scores.flatten(1).topk(min(limit, scores[0].numel()))
        rows, classes = cells // num_classes, cells % num_classes
    height, width = sizes.unbind(1)
    boxes = box_convert(predictions.boxes.float(), "cxcywh", "xyxy")
    boxes = boxes * torch.stack([width, height, width, height], dim=1).to(boxes)[:, None]
    boxes = boxes.gather(1, rows[..., None].expand(-1, -1, 4))
    return [
        {"scores": s, "labels": c, "boxes": b}
        for s, c, b in zip(scores.unbind(), classes.unbind(), boxes, strict=True)
    ]


def predictions_from_heads(logits: Tensor, boxes: Tensor, num_classes: int) -> Predictions:
    """The `logits` and `pred_boxes` of a model of any family as [`Predictions`]: with one column more than classes the
    head is softmax and that column no-object, else it is sigmoid."""
    return Predictions(logits, boxes, activation="softmax" if logits.shape[-1] > num_classes else "sigmoid")


def references_from_labels(labels: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The ground truth of every image in the metric's form, from the labels of the collator.

    Args:
        labels (`list[dict[str, torch.Tensor]]`): one per image, with `image_id` `(1,)`, `class_labels` `(num_boxes,)`,
            `boxes` `(num_boxes, 4)`, center, width and height in [0, 1] of the image, `orig_size` `(2,)`, height and
            width in pixels, and optionally `area` `(num_boxes,)` in square pixels (default: the boxes' areas),
            `iscrowd` `(num_boxes,)` (default: 0), and `crowd_boxes`, `crowd_labels`, `crowd_area`: crowd regions, in
            which detections do not count as false.

    Returns:
        `list[dict[str, torch.Tensor]]`: `image_id` of shape `()`, `boxes` (corners in pixels), `labels`, `area`,
        `iscrowd`.
    """
    return [_reference(label) for label in labels]


def _reference(label: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One image: boxes first, crowd regions after them."""
    height, width = label["orig_size"].unbind()
    scale = torch.stack([width, height, width, height])
    boxes, classes = label["boxes"].reshape(-1, 4) * scale, label["class_labels"]
    crowd = label.get("crowd_boxes", boxes[:0]) * scale
    corners = box_convert(torch.cat([boxes, crowd]), "cxcywh", "xyxy")
    area = box_area(corners)
    return {
        "image_id": label["image_id"].reshape(()),
        "boxes": corners,
        "labels": torch.cat([classes, label.get("crowd_labels", classes[:0])]),
        "area": torch.cat([label.get("area", area[: len(boxes)]), label.get("crowd_area", area[len(boxes) :])]),
        "iscrowd": torch.cat([label.get("iscrowd", torch.zeros_like(classes)), classes.new_ones(len(crowd))]),
    }
