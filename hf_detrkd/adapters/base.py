"""Base class of the adapters: one hooked forward pass, and further decoder passes on the same memory.

Every encoder-decoder detector of transformers calls `self.decoder(**kwargs)` exactly once. The keyword arguments of
that call include the memory; `decode` calls the decoder again with the same arguments but other queries. Nothing is
recomputed, gradients reach the backbone, and no buffer of the model changes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..losses.criterion import Answers, Denoising, DetectionCriterion, ModelCriterion
from ..structures.outputs import DetectorOutput, DetectorSpec, FeatureMap, ObjectQueries, Predictions
from ..structures.targets import BatchTotals, Targets
from .hooks import DecoderCall, apart, captured, projected_once, straight_gradients


class DetectorAdapter:
    """Interface to one detector family: encode images, then decode any set of queries.

    A family implements [`spec_of`], [`criterion_of`], [`necks`], [`own_queries`], [`place`] (converts external queries
    to decoder arguments) and [`read`] (converts a decoder's output to predictions). Everything else is shared.

    Args:
        model ([`~transformers.PreTrainedModel`]): a `...ForObjectDetection` of the family.
    """

    uses_pixel_mask: ClassVar[bool] = True
    """True if the family masks padding; otherwise padded images raise an error."""

    size_divisor: ClassVar[int] = 1
    """The sides of images must be multiples of this."""

    decoder_options: ClassVar[dict[str, Any]] = {}
    """Keyword arguments of the base model that make its decoder return every layer."""

    backbone_prefix: str = "model.backbone."
    """Prefix of the names of the backbone's parameters."""

    frozen_stages: ClassVar[int] = 0
    """Parts of a trained backbone that the authors' code freezes: 1 = stem, 2 = stem and first stage."""

    mask_argument: ClassVar[str] = "attention_mask"
    """Argument of the decoder's self-attention for the additive attention mask."""

    background_first: ClassVar[bool] = False
    """True if the rows of no-object come before those of the classes in the weights of the class head."""

    processor_type: ClassVar[str | None] = None
    """Model type whose image processor is used, if transformers has none for this family."""

    full_precision: ClassVar[frozenset[str]] = frozenset()
    """Parts of the model, by name, that compute in float32 also under autocast."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.spec = self.supervised_spec_of(model.config)
        self.criterion: DetectionCriterion | ModelCriterion = self.criterion_of(model.config)

    @property
    def decoder(self) -> Any:
        return self.model.model.decoder

    # --- implemented by each family -------------------------------------------------------------------------------

    @staticmethod
    def spec_of(config: PreTrainedConfig) -> DetectorSpec:
        """Static properties of a detector, from its config."""
        raise NotImplementedError

    @staticmethod
    def criterion_of(config: PreTrainedConfig) -> DetectionCriterion | ModelCriterion:
        """The family's detection loss."""
        raise NotImplementedError

    @classmethod
    def supervised_spec_of(cls, config: PreTrainedConfig) -> DetectorSpec:
        """[`spec_of`] with the loss of [`criterion_of`]."""
        criterion = cls.criterion_of(config)
        supervision = criterion if isinstance(criterion, DetectionCriterion) else None
        return replace(cls.spec_of(config), supervision=supervision)

    def necks(self) -> list[nn.Module]:
        """Modules whose outputs, in this order, are the projected maps that enter the encoder."""
        raise NotImplementedError

    def neck_maps(self, output: Any) -> list[Tensor]:
        """The feature maps in the output of one of the [`necks`]."""
        return [output]

    def own_queries(self, call: DecoderCall) -> ObjectQueries:
        """The model's own queries of this pass, without denoising queries."""
        raise NotImplementedError

    def place(self, queries: ObjectQueries, call: DecoderCall) -> dict[str, Any]:
        """Decoder arguments for these queries; they override the captured arguments."""
        raise NotImplementedError

    def read(self, output: Any, arguments: dict[str, Any]) -> tuple[Predictions, ...]:
        """Predictions of every layer from a decoder's output, including denoising queries and all query groups."""
        raise NotImplementedError

    def needed(self, queries: ObjectQueries, name: str) -> Tensor:
        """Returns a required field of the queries; for points, the centres of boxes are used if given.

        Raises:
            ValueError: the queries do not have the field.
        """
        value: Tensor | None = queries.centers if name == "points" else queries.tensors.get(name)
        if value is None:
            raise ValueError(f"{self.spec.family} queries need `{name}`, got only {sorted(queries.fields)}.")
        return value

    def denoising_groups(self, call: DecoderCall) -> tuple[int, int]:
        """Number of denoising queries, which come before the own queries, and the number of their groups."""
        return 0, 0

    def encoder_proposals(self, call: DecoderCall) -> Predictions | None:
        """Proposals of a two-stage encoder that the detection loss supervises."""
        return None

    def own_mode(self) -> AbstractContextManager[Any]:
        """Context in which the model's own queries are decoded."""
        return nullcontext()

    def foreign_mode(self) -> AbstractContextManager[Any]:
        """Context in which external queries are decoded."""
        return self.own_mode()

    # --- encode and decode ----------------------------------------------------------------------------------------

    def __call__(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        targets: Targets | None = None,
        totals: BatchTotals | None = None,
    ) -> tuple[DetectorOutput, dict[str, Tensor]]:
        """Encodes a batch, decodes the model's own queries and computes their detection loss.

        Args:
            pixel_values, pixel_mask, targets: see [`encode`]. With `targets` the detection loss is computed.
            totals ([`BatchTotals`], *optional*): divisors of the loss. Default: those of this batch only.

        Returns:
            `tuple[DetectorOutput, dict[str, torch.Tensor]]`: the output, and the weighted parts of its detection loss
            (empty without targets).
        """
        output, answers = self.encode(pixel_values, pixel_mask, targets)
        if targets is None or answers is None:
            return output, {}
        totals = totals or BatchTotals.of(targets.counts, self.spec.num_queries)
        losses = self.criterion(answers, targets, totals)
        return replace(output, loss=torch.stack(list(losses.values())).sum()), losses

    def encode(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, targets: Targets | None = None
    ) -> tuple[DetectorOutput, Answers | None]:
        """Encodes a batch and decodes the model's own queries, without computing a loss.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised for this model.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*): 1 where a pixel is real.
            targets ([`Targets`], *optional*): families with denoising create denoising queries from them.

        Returns:
            `tuple[DetectorOutput, Answers]`: the output, and the input of the detection loss (`None` without targets).

        Raises:
            ValueError: a `pixel_mask` for a family that cannot mask padding.
        """
        self.refuse_mask(pixel_mask)
        seen = captured(self.body, self.decoder, self.necks(), self.neck_maps)
        with seen as call, straight_gradients(self.model, pixel_values), self.own_mode():
            self._run(call, pixel_values, pixel_mask, targets)
        call.pixel_mask = pixel_mask
        everything, (rows, _) = self.read(call.output, call.arguments), self.denoising_groups(call)
        output = DetectorOutput(
            layers=tuple(layer.rows(rows, rows + self.spec.num_queries) for layer in everything),
            queries=self.own_queries(call),
            features={"neck": self._maps(call, call.necks), "encoder": self._maps(call, self._memory(call))},
            decode=partial(self._decode, call),
        )
        return output, None if targets is None else self.answers(everything, call)

    def refuse_mask(self, pixel_mask: Tensor | None) -> None:
        if pixel_mask is not None and not self.uses_pixel_mask:
            raise ValueError(
                f"{self.spec.family} cannot mask padding, but the batch is padded: resize to a fixed size instead."
            )

    def answers(self, layers: tuple[Predictions, ...], call: DecoderCall) -> Answers:
        """Splits the predictions of all queries into the input of the detection loss."""
        rows, groups = self.denoising_groups(call)
        own = tuple(layer.rows(rows, None) for layer in layers)
        denoising = Denoising(tuple(layer.rows(0, rows) for layer in layers), groups) if rows else None
        num_groups = own[0].logits.shape[1] // self.spec.num_queries
        return Answers(own, num_groups, self.encoder_proposals(call), denoising, model_losses=call.losses)

    def _run(
        self, call: DecoderCall, pixel_values: Tensor, pixel_mask: Tensor | None, targets: Targets | None
    ) -> None:
        """Forward pass of the base model, or with heads and loss if the model's own loss is used."""
        inputs = {"pixel_values": pixel_values, "pixel_mask": pixel_mask} | self.decoder_options
        if targets is not None and isinstance(self.criterion, ModelCriterion):
            call.losses = {"transformers": self.model(**inputs, labels=targets.to_labels()).loss}
        else:
            labels = {} if targets is None else self._denoising_labels(targets)
            self.body(**inputs, **labels)

    def _decode(self, call: DecoderCall, queries: ObjectQueries) -> tuple[Predictions, ...]:
        arguments = call.arguments | self.place(queries, call)
        with self.foreign_mode(), self._apart(queries.groups), projected_once(call.projections):
            return self.read(self.decoder(**arguments), arguments)

    def _apart(self, groups: Tensor | None) -> AbstractContextManager[Any]:
        """Context in which queries of different groups do not attend to each other."""
        return nullcontext() if groups is None else apart(self.decoder.layers, groups, self.mask_argument)

    def _denoising_labels(self, targets: Targets) -> dict[str, Any]:
        """Labels for families that create denoising queries from them."""
        return {}

    def _memory(self, call: DecoderCall) -> list[Tensor]:
        """The decoder's memory `(batch_size, tokens, width)` as one map per level."""
        memory = call.arguments["encoder_hidden_states"]
        shapes = call.arguments.get("spatial_shapes_list") or [call.necks[-1].shape[-2:]]
        levels = memory.split([height * width for height, width in shapes], dim=1)
        # one (batch_size, channels, height, width) map per level
        return [level.mT.unflatten(-1, tuple(shape)) for level, shape in zip(levels, shapes, strict=True)]

    def _maps(self, call: DecoderCall, values: list[Tensor]) -> tuple[FeatureMap, ...]:
        if call.pixel_mask is None:
            return tuple(FeatureMap(value) for value in values)
        mask = call.pixel_mask[:, None].float()
        return tuple(FeatureMap(v, F.interpolate(mask, v.shape[-2:])[:, 0] < 0.5) for v in values)

    @property
    def body(self) -> nn.Module:
        """The model without heads and loss. transformers before 5.17 gives RT-DETR and its line no `base_model`."""
        base = self.model.base_model
        return self.model.model if base is self.model else base

    # --- parameters --------------------------------------------------------------------------------------------------

    def backbone_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Named parameters of the backbone, for its own learning rate and for freezing."""
        named = self.model.named_parameters()
        return [(name, p) for name, p in named if name.startswith(self.backbone_prefix)]
