"""RT-DETR: queries are encoder proposals; heads inside the decoder; denoising in training."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..losses.criterion import DetectionCriterion
from ..losses.matching import HungarianMatcher
from ..structures.outputs import DetectorSpec, ObjectQueries, Predictions
from ..structures.targets import Targets
from .base import DetectorAdapter
from .hooks import DecoderCall
from .queries import inverse_sigmoid, take_rows


class RTDetrAdapter(DetectorAdapter):
    """Adapter of `RTDetrForObjectDetection` (Zhao et al., https://arxiv.org/abs/2304.08069) and
    `RTDetrV2ForObjectDetection` (Lv et al., https://arxiv.org/abs/2407.17140).

    External queries without content start from the model's own encoder tokens: those at `rows` if teacher and student
    share the grid, otherwise the token of the level and cell that fit the box (ours).
    """

    uses_pixel_mask: ClassVar[bool] = False
    size_divisor: ClassVar[int] = 32
    processor_type: ClassVar[str | None] = "rt_detr"

    @staticmethod
    def spec_of(config: PreTrainedConfig) -> DetectorSpec:
        return DetectorSpec(
            family=config.model_type,
            query_fields=frozenset({"content", "boxes"}),
            width=config.d_model,
            num_layers=config.decoder_layers,
            num_queries=config.num_queries,
            num_classes=config.num_labels,
            activation="sigmoid",
            features={
                "neck": (config.encoder_hidden_dim,) * len(config.encoder_in_channels),
                "encoder": (config.d_model,) * config.num_feature_levels,
            },
        )

    @staticmethod
    def criterion_of(config: PreTrainedConfig) -> DetectionCriterion:
        return DetectionCriterion(
            "varifocal",
            HungarianMatcher(
                config.matcher_class_cost,
                config.matcher_bbox_cost,
                config.matcher_giou_cost,
                config.matcher_alpha,
                config.matcher_gamma,
            ),
            class_weight=config.weight_loss_vfl,
            box_weight=config.weight_loss_bbox,
            giou_weight=config.weight_loss_giou,
            alpha=config.focal_loss_alpha,
            gamma=config.focal_loss_gamma,
        )

    def necks(self) -> list[nn.Module]:
        return list(self.model.model.encoder_input_proj)

    def own_queries(self, call: DecoderCall) -> ObjectQueries:
        start, _ = self.denoising_groups(call)
        content = call.arguments["inputs_embeds"][:, start:]
        boxes = call.arguments["reference_points"][:, start:].float().sigmoid()
        best = call.model_output.enc_outputs_class.amax(-1)
        return ObjectQueries(content=content, boxes=boxes, rows=best.topk(content.shape[1], dim=1).indices)

    def place(self, queries: ObjectQueries, call: DecoderCall) -> dict[str, Any]:
        boxes = self.needed(queries, "boxes")
        content = self._own_content(queries, call) if queries.content is None else queries.content
        return {
            "inputs_embeds": content,
            "reference_points": inverse_sigmoid(boxes).to(content.dtype),
            "encoder_attention_mask": None,  # despite the name, the self-attention mask of denoising queries
        }

    @torch.no_grad()
    def _own_content(self, queries: ObjectQueries, call: DecoderCall) -> Tensor:
        """Encoder tokens as the model itself selects them, without gradient as in the model."""
        assert queries.boxes is not None
        base, memory = self.model.model, call.arguments["encoder_hidden_states"]
        rows = queries.rows
        if rows is None:
            rows = rows_at(queries.boxes, call.arguments["spatial_shapes_list"])
        return base.enc_output(take_rows(memory, rows))

    def read(self, output: Any, arguments: dict[str, Any]) -> tuple[Predictions, ...]:
        layers = zip(
            output.intermediate_logits.unbind(1),
            output.intermediate_reference_points.unbind(1),
            output.intermediate_hidden_states.unbind(1),
            strict=True,
        )
        return tuple(Predictions(logits, boxes.float(), states) for logits, boxes, states in layers)

    def denoising_groups(self, call: DecoderCall) -> tuple[int, int]:
        meta = call.model_output.denoising_meta_values
        return (0, 0) if meta is None else (meta["dn_num_split"][0], meta["dn_num_group"])

    def encoder_proposals(self, call: DecoderCall) -> Predictions | None:
        return Predictions(call.model_output.enc_topk_logits, call.model_output.enc_topk_bboxes)

    def _denoising_labels(self, targets: Targets) -> dict[str, Any]:
        return {"labels": targets.to_labels()}


def rows_at(boxes: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """Encoder token for each box: the level whose anchor (0.05, 0.1, 0.2, ... of the image) is nearest in size, and
    its cell that contains the centre.

    Args:
        boxes (`torch.Tensor` of shape `(batch_size, num_queries, 4)`): cxcywh in [0, 1].
        shapes (`list[tuple[int, int]]`): height and width of each level.

    Returns:
        `torch.LongTensor` of shape `(batch_size, num_queries)`: indices into the flattened levels.
    """
    size = (boxes[..., 2] * boxes[..., 3]).clamp(min=1e-8).sqrt()
    level = (size / 0.05).log2().round().clamp(0, len(shapes) - 1).long()
    grid = torch.tensor(shapes).to(boxes.device, non_blocking=True)
    start = grid.prod(-1).cumsum(0) - grid.prod(-1)  # index of the first token of each level
    height, width = grid[level].unbind(-1)
    x = (boxes[..., 0] * width).long().clamp(min=0).minimum(width - 1)
    y = (boxes[..., 1] * height).long().clamp(min=0).minimum(height - 1)
    return start[level] + y * width + x
