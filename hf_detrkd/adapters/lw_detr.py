"""LW-DETR and RF-DETR: a ViT backbone without encoder; queries are boxes, in several groups during training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..losses.criterion import DetectionCriterion
from ..losses.matching import HungarianMatcher
from ..models.compat import class_loss_weight
from ..structures.outputs import DetectorSpec, ObjectQueries, Predictions
from .base import DetectorAdapter
from .hooks import DecoderCall
from .queries import nearest_own


class LwDetrAdapter(DetectorAdapter):
    """Adapter of `LwDetrForObjectDetection` (Chen et al., https://arxiv.org/abs/2406.03459).

    Own queries and predictions are those of the first group, the only one in evaluation; the detection loss uses every
    group. External queries form one group, and their boxes get the content of the nearest own box (ours: contents are
    learned and independent of the box).
    """

    backbone_prefix: str = "model.backbone.backbone."
    mask_argument: ClassVar[str] = "group_mask"

    @staticmethod
    def spec_of(config: PreTrainedConfig) -> DetectorSpec:
        levels = (config.d_model,) * len(config.projector_scale_factors)
        return _spec(config, levels)

    @staticmethod
    def criterion_of(config: PreTrainedConfig) -> DetectionCriterion:
        return DetectionCriterion(
            "iou_aware",
            HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost),
            class_weight=class_loss_weight(config),
            box_weight=config.bbox_loss_coefficient,
            giou_weight=config.giou_loss_coefficient,
            alpha=config.focal_alpha,
        )

    def necks(self) -> list[nn.Module]:
        return [self.model.model.backbone]

    def neck_maps(self, output: Any) -> list[Tensor]:
        return [values for values, _ in output]

    def own_queries(self, call: DecoderCall) -> ObjectQueries:
        first = slice(0, self.spec.num_queries)
        return ObjectQueries(
            content=call.arguments["inputs_embeds"][:, first], boxes=call.arguments["reference_points"][:, first]
        )

    def place(self, queries: ObjectQueries, call: DecoderCall) -> dict[str, Any]:
        boxes = self.needed(queries, "boxes")
        content = self.needed(nearest_own(queries, self.own_queries(call), ("content",)), "content")
        return {"inputs_embeds": content, "reference_points": boxes.to(content.dtype)}

    @contextmanager
    def foreign_mode(self) -> Iterator[None]:
        """Sets the self-attention to eval mode: in training mode it splits queries into groups."""
        modules = [layer.self_attn for layer in self.decoder.layers]
        before = [module.training for module in modules]
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, training in zip(modules, before, strict=True):
                module.training = training

    @contextmanager
    def _apart(self, groups: Tensor | None) -> Iterator[None]:
        """The self-attention has no mask argument, but passes its keyword arguments to an attention that has one."""
        config = self.model.config
        before = config._attn_implementation_internal  # only the decoder's: the public name sets the backbone's too
        try:
            if groups is not None:
                config._attn_implementation_internal = "group_mask"
            with super()._apart(groups):
                yield
        finally:
            config._attn_implementation_internal = before

    def read(self, output: Any, arguments: dict[str, Any]) -> tuple[Predictions, ...]:
        states = output.intermediate_hidden_states
        logits = self.model.class_embed(states)
        boxes = refined(arguments["reference_points"], self.model.bbox_embed(states))
        layers = zip(logits.unbind(0), boxes.unbind(0), states.unbind(0), strict=True)
        return tuple(Predictions(*layer) for layer in layers)

    def encoder_proposals(self, call: DecoderCall) -> Predictions | None:
        output, heads = call.model_output, self.model.model.enc_out_class_embed
        groups = output.enc_outputs_class.split(self.spec.num_queries, dim=1)  # hidden states, despite the name
        logits = torch.cat([head(states) for head, states in zip(heads, groups, strict=False)], dim=1)
        return Predictions(logits, output.enc_outputs_coord_logits.float())  # boxes, despite the name


def attention_with_group_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    group_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of transformers with a mask that is passed through `**kwargs`."""
    return sdpa_attention_forward(module, query, key, value, group_mask, **kwargs)


AttentionInterface.register("group_mask", attention_with_group_mask)


class RfDetrAdapter(LwDetrAdapter):
    """Adapter of `RfDetrForObjectDetection` (Robinson et al., https://arxiv.org/abs/2511.09554): one level."""

    @staticmethod
    def spec_of(config: PreTrainedConfig) -> DetectorSpec:
        return _spec(config, (config.d_model,))

    def neck_maps(self, output: Any) -> list[Tensor]:
        return [output[0]]


def _spec(config: PreTrainedConfig, levels: tuple[int, ...]) -> DetectorSpec:
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


def refined(boxes: Tensor, delta: Tensor) -> Tensor:
    """Applies box deltas: shift in units of the box size, exponential scale. No sigmoid: boxes may leave the image."""
    boxes, delta = boxes.float(), delta.float()
    return torch.cat([delta[..., :2] * boxes[..., 2:] + boxes[..., :2], delta[..., 2:].exp() * boxes[..., 2:]], dim=-1)
