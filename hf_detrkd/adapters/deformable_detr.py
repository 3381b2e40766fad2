"""Deformable DETR: plain and with box refinement (queries are points), and two-stage (queries are boxes)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..losses.criterion import DetectionCriterion
from ..losses.matching import HungarianMatcher
from ..structures.outputs import DetectorSpec, ObjectQueries, Predictions
from .base import DetectorAdapter
from .hooks import DecoderCall
from .queries import inverse_sigmoid, nearest_own


class DeformableDetrAdapter(DetectorAdapter):
    """Adapter of `DeformableDetrForObjectDetection` (Zhu et al., https://arxiv.org/abs/2010.04159).

    * one-stage: a query is an embedding, from which the model derives its reference point. External points without
      embeddings get those of the own query with the nearest point (ours), so that both models use the same point.
    * two-stage: a query is a box; position and content are derived from it.
    """

    frozen_stages = 2

    @staticmethod
    def spec_of(config: PreTrainedConfig) -> DetectorSpec:
        form = "two_stage" if config.two_stage else "refine" if config.with_box_refine else "plain"
        fields = {"content", "boxes"} if config.two_stage else {"content", "position", "points"}
        levels = (config.d_model,) * config.num_feature_levels
        return DetectorSpec(
            family=f"{config.model_type}/{form}",
            query_fields=frozenset(fields),
            width=config.d_model,
            num_layers=config.decoder_layers,
            num_queries=config.two_stage_num_proposals if config.two_stage else config.num_queries,
            num_classes=config.num_labels,
            activation="sigmoid",
            max_detections=100,
            features={"neck": levels, "encoder": levels},
        )

    @staticmethod
    def criterion_of(config: PreTrainedConfig) -> DetectionCriterion:
        return DetectionCriterion(
            "focal",
            HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost),
            box_weight=config.bbox_loss_coefficient,
            giou_weight=config.giou_loss_coefficient,
            alpha=config.focal_alpha,
            class_agnostic_encoder=True,
        )

    def necks(self) -> list[nn.Module]:
        return list(self.model.model.input_proj)

    def own_queries(self, call: DecoderCall) -> ObjectQueries:
        content, reference = call.arguments["inputs_embeds"], call.arguments["reference_points"]
        if not self.model.config.two_stage:
            position = call.arguments["object_queries_position_embeddings"]
            return ObjectQueries(content=content, position=position, points=reference)
        foreground = call.model_output.enc_outputs_class[..., 0]
        return ObjectQueries(content=content, boxes=reference, rows=foreground.topk(content.shape[1], dim=1).indices)

    def place(self, queries: ObjectQueries, call: DecoderCall) -> dict[str, Any]:
        if self.model.config.two_stage:
            return self._place_boxes(queries)
        return self._place_points(queries, call)

    def _place_boxes(self, queries: ObjectQueries) -> dict[str, Any]:
        model, boxes = self.model.model, self.needed(queries, "boxes")
        embedded = model.get_proposal_pos_embed(inverse_sigmoid(boxes, eps=1e-7)).to(model.pos_trans.weight.dtype)
        position, own = model.pos_trans_norm(model.pos_trans(embedded)).chunk(2, dim=-1)
        content = own if queries.content is None else queries.content
        return {
            "inputs_embeds": content,
            "object_queries_position_embeddings": position,
            "reference_points": boxes.to(position.dtype),
        }

    def _place_points(self, queries: ObjectQueries, call: DecoderCall) -> dict[str, Any]:
        points = self.needed(queries, "points")
        whole = nearest_own(queries, self.own_queries(call), ("content", "position"))
        assert whole.content is not None and whole.position is not None
        return {
            "inputs_embeds": whole.content,
            "object_queries_position_embeddings": whole.position,
            "reference_points": points.to(whole.position.dtype),
        }

    def read(self, output: Any, arguments: dict[str, Any]) -> tuple[Predictions, ...]:
        states = output.intermediate_hidden_states.unbind(1)
        references = [arguments["reference_points"], *output.intermediate_reference_points.unbind(1)[:-1]]
        return tuple(
            Predictions(self.model.class_embed[layer](state), self._boxes(layer, state, reference), state)
            for layer, (state, reference) in enumerate(zip(states, references, strict=True))
        )

    def _boxes(self, layer: int, states: Tensor, reference: Tensor) -> Tensor:
        delta, origin = self.model.bbox_embed[layer](states).float(), inverse_sigmoid(reference)
        if origin.shape[-1] == 2:  # points
            origin = nn.functional.pad(origin, (0, 2))
        return (delta + origin).sigmoid()

    def encoder_proposals(self, call: DecoderCall) -> Predictions | None:
        if not self.model.config.two_stage:
            return None
        output = call.model_output
        # Proposals outside the image have infinite logits; the sigmoid turns them into finite boxes without gradient.
        return Predictions(output.enc_outputs_class, output.enc_outputs_coord_logits.float().sigmoid())
