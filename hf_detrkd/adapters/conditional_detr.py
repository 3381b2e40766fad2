"""Conditional DETR: queries are learned embeddings with a reference point each; sigmoid heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..losses.criterion import DetectionCriterion
from ..losses.matching import HungarianMatcher
from ..structures.outputs import DetectorSpec, ObjectQueries, Predictions
from .detr import DetrAdapter
from .hooks import DecoderCall
from .queries import inverse_sigmoid, nearest_own


class ConditionalDetrAdapter(DetrAdapter):
    """Adapter of `ConditionalDetrForObjectDetection` (Meng et al., https://arxiv.org/abs/2108.06152).

    The decoder derives a reference point from each position embedding. The point of an external query replaces it;
    missing embeddings are copied from the own query with the nearest point (ours).
    """

    @staticmethod
    def spec_of(config: PreTrainedConfig) -> DetectorSpec:
        fields = frozenset({"content", "position", "points"})
        return replace(DetrAdapter.spec_of(config), query_fields=fields, activation="sigmoid", max_detections=100)

    @staticmethod
    def criterion_of(config: PreTrainedConfig) -> DetectionCriterion:
        return DetectionCriterion(
            "focal",
            HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost),
            class_weight=config.cls_loss_coefficient,
            box_weight=config.bbox_loss_coefficient,
            giou_weight=config.giou_loss_coefficient,
            alpha=config.focal_alpha,
        )

    def own_queries(self, call: DecoderCall) -> ObjectQueries:
        return replace(super().own_queries(call), points=call.output.reference_points.transpose(0, 1))

    def place(self, queries: ObjectQueries, call: DecoderCall) -> dict[str, Any]:
        if queries.position is None:
            self.needed(queries, "points")
            queries = nearest_own(queries, self.own_queries(call), ("position", "content"))
        return super().place(queries, call)

    def _decode(self, call: DecoderCall, queries: ObjectQueries) -> tuple[Predictions, ...]:
        if queries.centers is None:
            return super()._decode(call, queries)
        with _returning(self.decoder.ref_point_head, inverse_sigmoid(queries.centers, eps=1e-7)):
            return super()._decode(call, queries)

    def read(self, output: Any, arguments: dict[str, Any]) -> tuple[Predictions, ...]:
        origin = inverse_sigmoid(output.reference_points.transpose(0, 1))
        origin = nn.functional.pad(origin, (0, 2))  # (batch_size, num_queries, 4)
        return tuple(
            Predictions(
                self.model.class_labels_classifier(states),
                (self.model.bbox_predictor(states).float() + origin).sigmoid(),
                states,
            )
            for states in self._layer_states(output)
        )


@contextmanager
def _returning(module: nn.Module, value: Tensor) -> Iterator[None]:
    """Makes the module return `value` for any input."""
    handle = module.register_forward_hook(lambda _, args, output: value.to(output.dtype))
    try:
        yield
    finally:
        handle.remove()
