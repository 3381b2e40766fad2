"""What all families share: one hooked forward pass, and the decoder asked again over the same memory.

Every encoder-decoder detector of transformers calls `self.decoder(**kwargs)` exactly once. The keyword arguments of
that call hold the memory; calling the decoder again with other queries in their place is `decode`. Nothing is
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
from .hooks import DecoderCall, apart, captured, straight_gradients


class DetectorAdapter:
    """One detector family in the two verbs of this package: encode an image, ask it any set of queries.

    A family answers: [`spec_of`], [`criterion_of`], which modules are its neck, its own queries of a pass, how foreign
    queries become decoder arguments, and how a decoder's output is read. Everything else is here.

    Args:
        model ([`~transformers.PreTrainedModel`]): a `...ForObjectDetection` of the family.
    """

    uses_pixel_mask: ClassVar[bool] = True
    """Whether the family masks padding; if not, padded images are refused."""

    decoder_options: ClassVar[dict[str, Any]] = {}
    """Keyword arguments for the base model that make its decoder return every layer."""

    backbone_prefix: str = "model.backbone."
    """What the names of the backbone's parameters begin with."""

    mask_argument: ClassVar[str] = "attention_mask"
    """Argument of the decoder's self-attention that is added to its logits."""

    background_first: ClassVar[bool] = False
    """Whether the rows of no-object come before those of the classes in the weights of the class head."""

    processor_type: ClassVar[str | None] = None
    """Model type whose image processor serves this family, where transformers gives it none."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.spec = self.spec_of(model.config)
        self.criterion: DetectionCriterion | ModelCriterion = self.criterion_of(model.config)

    @property
    def decoder(self) -> Any:
        return self.model.model.decoder

    # --- what a family answers ---------------------------------------------------------------------------------------

    @staticmethod
    def spec_of(config: PreTrainedConfig) -> DetectorSpec:
        """What methods need to know before the first image."""
        raise NotImplementedError

    @staticmethod
    def criterion_of(config: PreTrainedConfig) -> DetectionCriterion | ModelCriterion:
        """The family's detection loss."""
        raise NotImplementedError

    def necks(self) -> list[nn.Module]:
        """Modules whose outputs, in order, are the projected maps that enter the encoder."""
        raise NotImplementedError

    def neck_maps(self, output: Any) -> list[Tensor]:
        """The maps in the output of such a module."""
        return [output]

    def own_queries(self, call: DecoderCall) -> ObjectQueries:
        """The queries that the model asked in this pass, without denoising rows."""
        raise NotImplementedError

    def place(self, queries: ObjectQueries, call: DecoderCall) -> dict[str, Any]:
        """Decoder arguments that ask these queries; merged over the captured ones."""
        raise NotImplementedError

    def read(self, output: Any, arguments: dict[str, Any]) -> tuple[Predictions, ...]:
        """Every layer's predictions from a decoder's output, rows of denoising and of all query groups included."""
        raise NotImplementedError

    def needed(self, queries: ObjectQueries, name: str) -> Tensor:
        """A field that the family cannot be asked without; a box serves as a point.

        Raises:
            ValueError: the queries do not have it.
        """
        value: Tensor | None = queries.centers if name == "points" else queries.tensors.get(name)
        if value is None:
            raise ValueError(f"{self.spec.family} queries need `{name}`, got only {sorted(queries.fields)}.")
        return value

    def denoising_groups(self, call: DecoderCall) -> tuple[int, int]:
        """Number of denoising rows in front of the own queries, and the number of their groups."""
        return 0, 0

    def encoder_proposals(self, call: DecoderCall) -> Predictions | None:
        """Predictions of a two-stage encoder that the detection loss supervises."""
        return None

    def own_mode(self) -> AbstractContextManager[Any]:
        """In force while the model's own queries are asked."""
        return nullcontext()

    def foreign_mode(self) -> AbstractContextManager[Any]:
        """In force while other queries are asked."""
        return self.own_mode()

    # --- the two verbs -----------------------------------------------------------------------------------------------

    def __call__(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        targets: Targets | None = None,
        totals: BatchTotals | None = None,
    ) -> tuple[DetectorOutput, dict[str, Tensor]]:
        """Encodes a batch, asks the model's own queries and computes their detection loss.

        Args:
            pixel_values, pixel_mask, targets: see [`encode`]. With `targets` the detection loss is computed.
            totals ([`BatchTotals`], *optional*): divisors of the loss; default: of this batch alone.

        Returns:
            `tuple[DetectorOutput, dict[str, torch.Tensor]]`: the pass, and the weighted parts of its detection loss
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
        """Encodes a batch and asks the model's own queries, without computing a loss.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised for this model.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*): 1 where a pixel is real.
            targets ([`Targets`], *optional*): families with denoising make queries from them.

        Returns:
            `tuple[DetectorOutput, Answers]`: the pass, and what the detection loss takes (`None` without targets).

        Raises:
            ValueError: a `pixel_mask` for a family that cannot mask padding.
        """
        self.refuse_mask(pixel_mask)
        seen = captured(self.model.base_model, self.decoder, self.necks(), self.neck_maps)
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
                f"{self.spec.family} sees padding as image, but the batch is padded: resize to a fixed size instead."
            )

    def answers(self, layers: tuple[Predictions, ...], call: DecoderCall) -> Answers:
        """What the detection loss takes, from the predictions of all rows."""
        rows, groups = self.denoising_groups(call)
        own = tuple(layer.rows(rows, None) for layer in layers)
        denoising = Denoising(tuple(layer.rows(0, rows) for layer in layers), groups) if rows else None
        num_groups = own[0].logits.shape[1] // self.spec.num_queries
        return Answers(own, num_groups, self.encoder_proposals(call), denoising, model_losses=call.losses)

    def _run(
        self, call: DecoderCall, pixel_values: Tensor, pixel_mask: Tensor | None, targets: Targets | None
    ) -> None:
        """The forward pass: of the base model, or with heads and loss where transformers' own loss is wanted."""
        inputs = {"pixel_values": pixel_values, "pixel_mask": pixel_mask} | self.decoder_options
        if targets is not None and isinstance(self.criterion, ModelCriterion):
            call.losses = {"transformers": self.model(**inputs, labels=targets.to_labels()).loss}
        else:
            labels = {} if targets is None else self._denoising_labels(targets)
            self.model.base_model(**inputs, **labels)

    def _decode(self, call: DecoderCall, queries: ObjectQueries) -> tuple[Predictions, ...]:
        arguments = call.arguments | self.place(queries, call)
        with self.foreign_mode(), self._apart(queries.groups):
            return self.read(self.decoder(**arguments), arguments)

    def _apart(self, groups: Tensor | None) -> AbstractContextManager[Any]:
        """In force while queries of groups are asked, which do not see each other."""
        return nullcontext() if groups is None else apart(self.decoder.layers, groups, self.mask_argument)

    def _denoising_labels(self, targets: Targets) -> dict[str, Any]:
        """Labels for families that make denoising queries from them."""
        return {}

    def _memory(self, call: DecoderCall) -> list[Tensor]:
        """The decoder's memory `(batch_size, tokens, width)` as one map per level."""
        memory = call.arguments["encoder_hidden_states"]
        shapes = call.arguments.get("spatial_shapes_list") or [call.necks[-1].shape[-2:]]
        levels = memory.split([height * width for height, width in shapes], dim=1)
        return [level.mT.unflatten(-1, tuple(shape)) for level, shape in zip(levels, shapes, strict=True)]

    def _maps(self, call: DecoderCall, values: list[Tensor]) -> tuple[FeatureMap, ...]:
        if call.pixel_mask is None:
            return tuple(FeatureMap(value) for value in values)
        mask = call.pixel_mask[:, None].float()
        return tuple(FeatureMap(v, F.interpolate(mask, v.shape[-2:])[:, 0] < 0.5) for v in values)

    # --- parameters --------------------------------------------------------------------------------------------------

    def backbone_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Named parameters of the backbone, for its own learning rate and for freezing."""
        named = self.model.named_parameters()
        return [(name, p) for name, p in named if name.startswith(self.backbone_prefix)]
