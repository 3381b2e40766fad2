"""DINO: queries are encoder proposals with learned content; heads in the decoder; denoising in training."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..losses.criterion import DetectionCriterion
from ..losses.matching import HungarianMatcher
from ..structures.outputs import DetectorSpec, ObjectQueries
from .hooks import DecoderCall
from .queries import nearest_own
from .rt_detr import RTDetrAdapter


class DinoDetrAdapter(RTDetrAdapter):
    """Adapter of [`~hf_detrkd.models.DinoDetrForObjectDetection`] (Zhang et al., https://arxiv.org/abs/2203.03605).

    Its outputs have the format of RT-DETR. External queries without content get that of the own query with the nearest
    box (ours): contents are learned and independent of the box.
    """

    uses_pixel_mask = True
    size_divisor = 1
    processor_type = "deformable_detr"
    frozen_stages = 2

    @staticmethod
    def spec_of(config: PreTrainedConfig) -> DetectorSpec:
        levels = (config.d_model,) * config.num_feature_levels
        return DetectorSpec(
            family=config.model_type,
            query_fields=frozenset({"content", "boxes"}),
            width=config.d_model,
            num_layers=config.decoder_layers,
            num_queries=config.num_queries,
            num_classes=config.num_labels,
            activation="sigmoid",
            max_detections=300,
            features={"neck": levels, "encoder": levels},
        )

    @staticmethod
    def criterion_of(config: PreTrainedConfig) -> DetectionCriterion:
        return DetectionCriterion(
            "focal",
            HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost),
            class_weight=config.class_loss_coefficient,
            box_weight=config.bbox_loss_coefficient,
            giou_weight=config.giou_loss_coefficient,
            alpha=config.focal_alpha,
        )

    def necks(self) -> list[nn.Module]:
        return list(self.model.model.input_proj)

    def own_queries(self, call: DecoderCall) -> ObjectQueries:
        start, _ = self.denoising_groups(call)
        content, boxes = call.arguments["inputs_embeds"], call.arguments["reference_points"]
        return ObjectQueries(content=content[:, start:], boxes=boxes[:, start:])

    def place(self, queries: ObjectQueries, call: DecoderCall) -> dict[str, Any]:
        boxes = self.needed(queries, "boxes")
        whole = nearest_own(queries, self.own_queries(call), ("content",))
        return {"inputs_embeds": whole.content, "reference_points": boxes, "self_attention_mask": None}
