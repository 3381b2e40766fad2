"""DAB-DETR: queries are boxes, refined from layer to layer; sigmoid heads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..losses.criterion import DetectionCriterion
from ..structures.outputs import DetectorSpec, ObjectQueries, Predictions
from .base import DetectorAdapter
from .conditional_detr import ConditionalDetrAdapter
from .hooks import DecoderCall
from .queries import inverse_sigmoid, nearest_own


SMALLEST = 2**-12  # side of a query's box: the decoder divides by it, in float16 too


class DabDetrAdapter(DetectorAdapter):
    """Adapter of `DabDetrForObjectDetection` (Liu et al., https://arxiv.org/abs/2201.12329).

    External boxes without content get that of the nearest own box: zeros, or its pattern if the model has patterns.
    """

    processor_type: ClassVar[str | None] = "conditional_detr"
    frozen_stages = 2

    @staticmethod
    def spec_of(config: PreTrainedConfig) -> DetectorSpec:
        return DetectorSpec(
            family=config.model_type,
            query_fields=frozenset({"content", "boxes"}),
            width=config.hidden_size,
            num_layers=config.decoder_layers,
            num_queries=config.num_queries * max(config.num_patterns, 1),
            num_classes=config.num_labels,
            activation="sigmoid",
            max_detections=300,
            features={"neck": (config.hidden_size,), "encoder": (config.hidden_size,)},
        )

    @staticmethod
    def criterion_of(config: PreTrainedConfig) -> DetectionCriterion:
        return ConditionalDetrAdapter.criterion_of(config)

    def necks(self) -> list[nn.Module]:
        return [self.model.model.input_projection]

    def own_queries(self, call: DecoderCall) -> ObjectQueries:
        arguments = call.arguments
        boxes = arguments["query_position_embeddings"].float().sigmoid()
        return ObjectQueries(content=arguments["inputs_embeds"], boxes=boxes)

    def place(self, queries: ObjectQueries, call: DecoderCall) -> dict[str, Any]:
        boxes = self.needed(queries, "boxes")
        content = self.needed(nearest_own(queries, self.own_queries(call), ("content",)), "content")
        centers, sizes = boxes.split(2, -1)
        anchors = inverse_sigmoid(torch.cat((centers, sizes.clamp(min=SMALLEST)), -1), eps=1e-7).to(content.dtype)
        return {"inputs_embeds": content, "query_position_embeddings": anchors}

    def read(self, output: Any, arguments: dict[str, Any]) -> tuple[Predictions, ...]:
        layers = zip(output.intermediate_hidden_states.unbind(0), output.reference_points.unbind(0), strict=True)
        return tuple(
            Predictions(
                self.model.class_embed(states),
                (self.model.bbox_predictor(states).float() + inverse_sigmoid(boxes)).sigmoid(),
                states,
            )
            for states, boxes in layers
        )
