"""DINO's loss built from transformers' components, for models trained without hf_detrkd's trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss


def dino_detr_loss(outputs: Any, labels: list[dict[str, Tensor]], config: Any) -> dict[str, Tensor]:
    """Weighted loss parts by name: focal loss, L1 and GIoU of every decoder layer, of the encoder's proposals, and of
    the denoising queries, which are assigned to the box that they were made from.

    Args:
        outputs (`RTDetrModelOutput`): output of [`DinoDetrModel`].
        labels (`list[dict]`): `class_labels` and `boxes` of each image.
        config ([`DinoDetrConfig`])
    """
    matcher = DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    criterion = DeformableDetrImageLoss(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"])
    weights = {
        "loss_ce": config.class_loss_coefficient,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
    count = max(sum(len(label["class_labels"]) for label in labels), 1)

    def losses(layer: dict[str, Tensor], indices: Any, divisor: int, name: str) -> dict[str, Tensor]:
        layer = {key: value.float() for key, value in layer.items()}
        indices = matcher(layer, labels) if indices is None else indices
        found: dict[str, Tensor] = {}
        for part in criterion.losses:
            found |= criterion.get_loss(part, layer, labels, indices, divisor)
        return {f"{key}{name}": weight * found[key] for key, weight in weights.items()}

    meta = outputs.denoising_meta_values
    start = 0 if meta is None else meta["dn_num_split"][0]
    layers = list(
        zip(outputs.intermediate_logits.unbind(1), outputs.intermediate_reference_points.unbind(1), strict=True)
    )
    parts = losses({"logits": outputs.enc_topk_logits, "pred_boxes": outputs.enc_topk_bboxes}, None, count, "_enc")
    for number, (logits, boxes) in enumerate(layers):
        parts |= losses({"logits": logits[:, start:], "pred_boxes": boxes[:, start:]}, None, count, f"_{number}")
        if meta is not None:
            groups = meta["dn_num_group"]
            made_from = [torch.arange(len(label["class_labels"])).repeat(groups) for label in labels]
            indices = list(zip((rows.cpu() for rows in meta["dn_positive_idx"]), made_from, strict=True))
            noised = {"logits": logits[:, :start], "pred_boxes": boxes[:, :start]}
            parts |= losses(noised, indices, count * groups, f"_dn_{number}")
    return parts
