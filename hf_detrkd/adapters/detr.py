"""DETR and Table Transformer: queries are learned embeddings without reference points; softmax heads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..losses.criterion import DetectionCriterion
from ..losses.matching import HungarianMatcher
from ..structures.outputs import DetectorSpec, ObjectQueries, Predictions
from .base import DetectorAdapter
from .hooks import DecoderCall


class DetrAdapter(DetectorAdapter):
    """Adapter of `DetrForObjectDetection` (Carion et al., https://arxiv.org/abs/2005.12872).

    A query is a learned position embedding; its content starts at zero. Queries can be shared only with a model of the
    same family and width.
    """

    decoder_options: ClassVar[dict[str, Any]] = {"output_hidden_states": True}
    frozen_stages = 2
    position_argument: ClassVar[str] = "object_queries_position_embeddings"

    @staticmethod
    def spec_of(config: PreTrainedConfig) -> DetectorSpec:
        return DetectorSpec(
            family=config.model_type,
            query_fields=frozenset({"content", "position"}),
            width=config.d_model,
            num_layers=config.decoder_layers,
            num_queries=config.num_queries,
            num_classes=config.num_labels,
            activation="softmax",
            features={"neck": (config.d_model,), "encoder": (config.d_model,)},
        )

    @staticmethod
    def criterion_of(config: PreTrainedConfig) -> DetectionCriterion:
        return DetectionCriterion(
            "cross_entropy",
            HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost),
            box_weight=config.bbox_loss_coefficient,
            giou_weight=config.giou_loss_coefficient,
            no_object_weight=config.eos_coefficient,
        )

    def necks(self) -> list[nn.Module]:
        return [self.model.model.input_projection]

    def own_queries(self, call: DecoderCall) -> ObjectQueries:
        return ObjectQueries(content=call.arguments["inputs_embeds"], position=call.arguments[self.position_argument])

    def place(self, queries: ObjectQueries, call: DecoderCall) -> dict[str, Any]:
        position = self.needed(queries, "position")
        content = torch.zeros_like(position) if queries.content is None else queries.content
        return {"inputs_embeds": content, self.position_argument: position, "output_hidden_states": True}

    def read(self, output: Any, arguments: dict[str, Any]) -> tuple[Predictions, ...]:
        return tuple(
            Predictions(
                self.model.class_labels_classifier(states),
                self.model.bbox_predictor(states).float().sigmoid(),
                states,
                "softmax",
            )
            for states in self._layer_states(output)
        )

    def _layer_states(self, output: Any) -> list[Tensor]:
        """Normalised state of every layer. With `auxiliary_loss` in its config the decoder normalises them itself."""
        if output.intermediate_hidden_states is not None:
            return [*output.intermediate_hidden_states[:-1], output.last_hidden_state]
        norm = self.model.model.decoder.layernorm
        return [*(norm(states) for states in output.hidden_states[1:-1]), output.last_hidden_state]


class TableTransformerAdapter(DetrAdapter):
    """Adapter of `TableTransformerForObjectDetection`: DETR with pre-norm layers."""

    position_argument: ClassVar[str] = "query_position_embeddings"
