"""DINO built from transformers' Deformable DETR.

Depends only on transformers and torch, because the file is copied into saved models.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoderLayer,
    DeformableDetrMLPPredictionHead,
    DeformableDetrModel,
    DeformableDetrPreTrainedModel,
    DeformableDetrSelfAttention,
    DeformableDetrSinePositionEmbedding,
)
from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding
from transformers.models.rt_detr.modeling_rt_detr import (
    RTDetrDecoderOutput,
    RTDetrModelOutput,
    RTDetrObjectDetectionOutput,
    get_contrastive_denoising_training_group,
)

from .configuration_dino_detr import DinoDetrConfig
from .loss_dino_detr import dino_detr_loss


PRIOR = 0.01  # initial class probability
EPSILON = 1e-3  # clamp of the inverse sigmoid, as in the original repository and in detrex


def inverse_sigmoid(values: Tensor) -> Tensor:
    values = values.float().clamp(0, 1)
    return (values.clamp(min=EPSILON) / (1 - values).clamp(min=EPSILON)).log()


def box_sine_embedding(boxes: Tensor, width: int) -> Tensor:
    """Sine embedding of boxes, cxcywh in [0, 1]: `width` features for each of cy, cx, w and h, `(..., 4 * width)`."""
    x, y, *size = (boxes * (2 * math.pi)).unbind(-1)
    periods = 10000 ** (torch.arange(0, width, 2, dtype=torch.float32, device=boxes.device) / width)
    angles = torch.stack([y, x, *size], -1)[..., None] / periods
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3).to(boxes.dtype)


def _as_tokens(values: Tensor) -> Tensor:
    """`(batch_size, height * width, channels)`, as transformers before 5.9 returns position embeddings."""
    return values if values.dim() == 3 else values.flatten(2).mT


def _start_linear(layer: nn.Linear) -> None:
    """Initial values of the linear layers of encoder and decoder: Xavier, and PyTorch's own for the bias."""
    init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        init.uniform_(layer.bias, -(layer.in_features**-0.5), layer.in_features**-0.5)


class DinoDetrQueryContent(nn.Embedding):
    """Learned content of the queries."""


class DinoDetrClassHead(nn.Linear):
    """Class logits of hidden states, initialised to the probability [`PRIOR`] for every class."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config.d_model, config.num_labels)


class DinoDetrBoxHead(DeformableDetrMLPPredictionHead):
    """Box deltas before the sigmoid, initialised to zero."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config.d_model, config.d_model, 4, 3)


class DinoDetrPreTrainedModel(DeformableDetrPreTrainedModel):
    config: DinoDetrConfig
    _no_split_modules = ["DeformableDetrConvEncoder", "DeformableDetrEncoderLayer", "DeformableDetrDecoderLayer"]

    def _initialize_weights(self, module: nn.Module, *_: bool) -> None:
        # For remote code, transformers takes modules without own parameters as initialised; check each parameter.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of the original repository: Xavier in encoder, decoder and queries, PyTorch's own in the
        heads, and N(0, 1) for the embeddings of classes. Children come before their parents, which know their use."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            _start_linear(module)
        elif isinstance(module, DinoDetrQueryContent):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        if isinstance(module, DeformableDetrSelfAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init.xavier_uniform_(projection.weight, gain=0.5**0.5)  # one matrix of three times the height there
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
                init.zeros_(projection.bias)
        elif isinstance(module, DinoDetrBoxHead):
            for layer in module.layers:
                init.kaiming_uniform_(layer.weight, a=5**0.5)
            init.zeros_(module.layers[-1].weight)
            init.zeros_(module.layers[-1].bias)
        elif isinstance(module, DinoDetrClassHead):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.constant_(module.bias, -math.log((1 - PRIOR) / PRIOR))
        elif isinstance(module, DinoDetrModel):
            for projection, _ in module.input_proj:
                init.xavier_uniform_(projection.weight)
                init.zeros_(projection.bias)
            for layer in module.encoder.layers:  # the encoder is a model with initial values of its own, too
                _start_linear(layer.mlp.fc1)
                _start_linear(layer.mlp.fc2)


class DinoDetrDecoder(DinoDetrPreTrainedModel):
    """Decoder with boxes as queries: every layer embeds the box refined by the previous layer.

    Look forward twice (section 3.5 of the paper): a layer's predicted box is refined from the previous layer's box
    *with gradient*, so its loss also trains that layer's refinement; as reference of a layer the box is detached.
    """

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config)
        width, heads = config.d_model, 1 if config.share_prediction_heads else config.decoder_layers
        self.layers = nn.ModuleList(DeformableDetrDecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.ref_point_head = DeformableDetrMLPPredictionHead(2 * width, width, width, 2)
        self.class_embed = nn.ModuleList(DinoDetrClassHead(config) for _ in range(heads))
        self.bbox_embed = nn.ModuleList(DinoDetrBoxHead(config) for _ in range(heads))
        self.post_init()

    def forward(
        self,
        inputs_embeds: Tensor,
        reference_points: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        spatial_shapes: Tensor,
        spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        valid_ratios: Tensor,
        self_attention_mask: Tensor | None = None,
    ) -> RTDetrDecoderOutput:
        """
        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`): content of the queries.
            reference_points (`torch.Tensor` of shape `(batch_size, num_queries, 4)`): their boxes, cxcywh in [0, 1].
            self_attention_mask (`torch.Tensor`, *optional*): added to the logits of the self-attention.

        Returns:
            `RTDetrDecoderOutput`: hidden states, logits and boxes (`intermediate_reference_points`) of every layer,
            with the layers in the second dimension.
        """
        states, logits, boxes = [], [], []
        hidden, reference = inputs_embeds, reference_points
        ratios = torch.cat([valid_ratios, valid_ratios], -1)[:, None]
        for number, layer in enumerate(self.layers):
            seen = reference.detach()
            # in units of the padded canvas, (batch_size, num_queries, num_levels, 4)
            canvas = seen[:, :, None] * ratios.to(seen.dtype)
            sine = box_sine_embedding(canvas[:, :, 0], self.config.d_model // 2)
            hidden = layer(
                hidden,
                self.ref_point_head(sine.to(hidden.dtype)),
                canvas.to(hidden.dtype),
                spatial_shapes,
                spatial_shapes_list,
                level_start_index,
                encoder_hidden_states,
                encoder_attention_mask,
                attention_mask=self_attention_mask,
            )
            refine, classify = (heads[number % len(heads)] for heads in (self.bbox_embed, self.class_embed))
            states.append(self.norm(hidden))
            logits.append(classify(states[-1]))
            boxes.append((refine(states[-1]) + inverse_sigmoid(reference)).sigmoid())
            reference = (refine(hidden) + inverse_sigmoid(seen)).sigmoid()
        return RTDetrDecoderOutput(
            last_hidden_state=states[-1],
            intermediate_hidden_states=torch.stack(states, 1),
            intermediate_logits=torch.stack(logits, 1),
            intermediate_reference_points=torch.stack(boxes, 1),
        )


class DinoDetrModel(DinoDetrPreTrainedModel, DeformableDetrModel):
    """DINO without its loss: backbone, encoder, mixed query selection, denoising queries, decoder with its heads."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config)
        del self.pos_trans, self.pos_trans_norm  # only for the proposal embedding of two-stage Deformable DETR
        width = config.d_model
        sine = DeformableDetrSinePositionEmbedding if config.centered_positions else DetrSinePositionEmbedding
        self.position_embedding = sine(width // 2, temperature=config.position_temperature, normalize=True)
        self.decoder = DinoDetrDecoder(config)
        self.query_content = DinoDetrQueryContent(config.num_queries, width)
        self.denoising_class_content = nn.Embedding(config.num_labels + 1, width)  # the last one for padding
        self.enc_class_embed = DinoDetrClassHead(config)
        self.enc_bbox_embed = DinoDetrBoxHead(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> RTDetrModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`)
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*): 1 where a pixel is real.
            labels (`list[dict]`, *optional*): `class_labels` and `boxes`, from which denoising queries are made in
                training; they come first in all outputs of the decoder.

        Raises:
            ValueError: the images have fewer cells than the model has queries.
        """
        memory = self._memory(pixel_values, pixel_mask, **kwargs)
        logits, boxes = self._proposals(memory)
        content = self.query_content.weight.expand(len(boxes), -1, -1)
        reference, mask, meta = boxes.detach(), None, None
        if self.training and labels is not None:
            noised, noised_boxes, mask, meta = get_contrastive_denoising_training_group(
                labels,
                self.config.num_labels,
                self.config.num_queries,
                self.denoising_class_content,
                self.config.num_denoising,
                self.config.label_noise_ratio,
                self.config.box_noise_scale,
            )
            if meta is not None:
                if self.config.box_noise_scale > 0:  # otherwise they are not logits
                    noised_boxes = noised_boxes.sigmoid()
                # As in the original, rows of padding have no content, and 0.5 for all four numbers of their box.
                padding = _denoising_padding(labels, noised.shape[1], noised.device)[..., None]
                content = torch.cat([noised.masked_fill(padding, 0.0), content], 1)
                reference = torch.cat([noised_boxes.masked_fill(padding, 0.5), reference], 1)
        decoded = self.decoder(inputs_embeds=content, reference_points=reference, self_attention_mask=mask, **memory)
        return RTDetrModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            intermediate_hidden_states=decoded.intermediate_hidden_states,
            intermediate_logits=decoded.intermediate_logits,
            intermediate_reference_points=decoded.intermediate_reference_points,
            init_reference_points=reference,
            encoder_last_hidden_state=memory["encoder_hidden_states"],
            enc_topk_logits=logits,
            enc_topk_bboxes=boxes,
            denoising_meta_values=meta,
        )

    def _memory(self, pixel_values: Tensor, pixel_mask: Tensor | None, **kwargs: Any) -> dict[str, Any]:
        """Decoder arguments of the memory: the encoded levels, flattened, their mask and their shapes."""
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0], dtype=torch.long)
        features = [values for values, _ in self.backbone(pixel_values, pixel_mask)]
        maps: list[Tensor] = []
        for level, project in enumerate(self.input_proj):
            source = features[level] if level < len(features) else (maps if level > len(features) else features)[-1]
            maps.append(project(source))
        shapes = [tuple(values.shape[-2:]) for values in maps]
        masks = [nn.functional.interpolate(pixel_mask[None].float(), size=shape)[0].bool() for shape in shapes]
        positions = [
            _as_tokens(self.position_embedding(values.shape, values.device, values.dtype, mask)) + embedding
            for values, mask, embedding in zip(maps, masks, self.level_embed, strict=True)
        ]
        sizes = torch.tensor(shapes, device=pixel_values.device)
        layout = {
            "spatial_shapes": sizes,
            "spatial_shapes_list": shapes,
            "level_start_index": sizes.prod(1).cumsum(0) - sizes.prod(1),
            "valid_ratios": torch.stack([self.get_valid_ratio(mask, maps[0].dtype) for mask in masks], 1),
        }
        mask = torch.cat([mask.flatten(1) for mask in masks], 1)
        encoded = self.encoder(
            inputs_embeds=torch.cat([values.flatten(2).mT for values in maps], 1),
            attention_mask=mask,
            spatial_position_embeddings=torch.cat(positions, 1),
            **layout,
            **kwargs,
        )
        return {"encoder_hidden_states": encoded.last_hidden_state, "encoder_attention_mask": mask} | layout

    def _proposals(self, memory: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits and boxes of the tokens with the highest class score; they are the initial boxes of the queries."""
        wanted, available = self.config.num_queries, memory["encoder_hidden_states"].shape[1]
        if available < wanted:
            raise ValueError(
                f"{wanted} queries cannot be selected from the {available} cells of these images: use larger images, "
                "or a config with fewer num_queries."
            )
        tokens, anchors = self.gen_encoder_output_proposals(
            memory["encoder_hidden_states"], ~memory["encoder_attention_mask"], memory["spatial_shapes_list"]
        )
        logits = self.enc_class_embed(tokens)
        rows = logits.amax(-1).topk(wanted, dim=1).indices[..., None]
        logits, tokens, anchors = (x.gather(1, rows.expand(-1, -1, x.shape[-1])) for x in (logits, tokens, anchors))
        return logits, (self.enc_bbox_embed(tokens).float() + anchors).sigmoid()


def _denoising_padding(labels: list[dict[str, Tensor]], num_rows: int, device: torch.device) -> Tensor:
    """True for the denoising queries of boxes that an image lacks, `(batch_size, num_rows)`: every group holds the
    positive copies of the boxes, then the negative ones, padded to the image with most boxes."""
    counts = [len(label["class_labels"]) for label in labels]
    real = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return ~real.repeat(1, num_rows // max(counts)).to(device, non_blocking=True)


class DinoDetrForObjectDetection(DinoDetrPreTrainedModel):
    """DINO with its loss if labels are given. Returns the last layer's `logits` `(batch_size, num_queries,
    num_labels)`, before the sigmoid, and `pred_boxes`, cxcywh in [0, 1], without denoising queries."""

    _auto_class = "AutoModelForObjectDetection"  # saved models include this code

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config)
        self.model = DinoDetrModel(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> RTDetrObjectDetectionOutput | tuple:
        """See [`DinoDetrModel.forward`]; with `labels` the output has `loss` and its parts in `loss_dict`."""
        outputs = self.model(pixel_values, pixel_mask, labels, **kwargs)
        own = slice(-self.config.num_queries, None)
        loss = parts = None
        if labels is not None:
            parts = dino_detr_loss(outputs, labels, self.config)
            loss = sum(parts.values())
        found = RTDetrObjectDetectionOutput(
            loss=loss,
            loss_dict=parts,
            logits=outputs.intermediate_logits[:, -1, own],
            pred_boxes=outputs.intermediate_reference_points[:, -1, own],
            **outputs,
        )
        return found if return_dict in (None, True) else found.to_tuple()


__all__ = ["DinoDetrForObjectDetection", "DinoDetrModel", "DinoDetrPreTrainedModel"]
