"""D-FINE and DEIMv2: RT-DETR with box edges as distributions over bins, refined from layer to layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..losses.criterion import Answers, DetectionCriterion
from ..losses.fine_grained import EdgeDistributions
from ..structures.outputs import Predictions
from .hooks import DecoderCall
from .rt_detr import RTDetrAdapter


class DFineAdapter(RTDetrAdapter):
    """Adapter of `DFineForObjectDetection` (Peng et al., https://arxiv.org/abs/2410.13842).

    Besides its layers the decoder returns an initial prediction of a separate head before layer 1. It returns all
    layers only in training mode, so the decoder's `training` flag is set during a pass.
    """

    @staticmethod
    def criterion_of(config: PreTrainedConfig) -> DetectionCriterion:
        plain = RTDetrAdapter.criterion_of(config)
        return replace(plain, fgl_weight=config.weight_loss_fgl, ddf_weight=config.weight_loss_ddf)

    @contextmanager
    def own_mode(self) -> Iterator[None]:
        before, self.decoder.training = self.decoder.training, True
        try:
            yield
        finally:
            self.decoder.training = before

    def read(self, output: Any, arguments: dict[str, Any]) -> tuple[Predictions, ...]:
        num_layers = output.intermediate_predicted_corners.shape[1]  # without the initial prediction
        layers = zip(
            output.intermediate_logits[:, -num_layers:].unbind(1),
            output.intermediate_reference_points[:, -num_layers:].unbind(1),
            output.intermediate_hidden_states.unbind(0),
            strict=True,
        )
        return tuple(Predictions(logits, boxes.float(), states) for logits, boxes, states in layers)

    def answers(self, layers: tuple[Predictions, ...], call: DecoderCall) -> Answers:
        """Adds the initial prediction as first layer and the edge distributions; boxes are clamped to the image, as in
        the authors' loss."""
        output = call.output
        guess = Predictions(output.intermediate_logits[:, 0], output.intermediate_reference_points[:, 0].float())
        inside = tuple(
            Predictions(layer.logits, layer.boxes.clamp(0, 1), None, layer.activation) for layer in (guess, *layers)
        )
        answers = super().answers(inside, call)
        rows, _ = self.denoising_groups(call)
        denoising = answers.denoising and replace(answers.denoising, edges=self._edges(output, 0, rows))
        return replace(answers, denoising=denoising, edges=self._edges(output, rows, None))

    def _edges(self, output: Any, start: int, stop: int | None) -> EdgeDistributions:
        config, rows = self.model.config, slice(start, stop)
        corners: Tensor = output.intermediate_predicted_corners[:, :, rows]
        # (num_layers, batch_size, num_queries, 4, num_bins + 1)
        logits = corners.unflatten(-1, (4, config.max_num_bins + 1)).transpose(0, 1)
        first = output.initial_reference_points[:, 0, rows].detach()
        return EdgeDistributions(logits, first, config.up, config.reg_scale)


class Deimv2Adapter(DFineAdapter):
    """Adapter of `Deimv2ForObjectDetection` (Huang et al., https://arxiv.org/abs/2509.20787): matchability-aware loss
    (MAL), and box losses in all layers for every query that is matched in any layer."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        name = "backbone" if model.config.backbone_config.model_type == "dinov3_vit" else "model"
        self.backbone_prefix = f"model.conv_encoder.{name}."

    @staticmethod
    def criterion_of(config: PreTrainedConfig) -> DetectionCriterion:
        return replace(
            DFineAdapter.criterion_of(config),
            classification="matchability",
            class_weight=config.weight_loss_mal,
            alpha=1.0 if config.mal_alpha is None else config.mal_alpha,
            dense_boxes=config.use_dense_one_to_one,
        )

    def necks(self) -> list[nn.Module]:
        if self.model.config.encoder_type == "lite":  # projects inside its encoder
            return list(self.model.model.encoder.input_proj)
        return [self.model.model.conv_encoder]

    def neck_maps(self, output: Any) -> list[Tensor]:
        return [output] if isinstance(output, Tensor) else list(output)
