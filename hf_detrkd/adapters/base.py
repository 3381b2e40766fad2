"""What all families share: one hooked forward pass, and the decoder asked again over the same memory.

Every encoder-decoder detector of transformers calls `self.decoder(**kwargs)` exactly once. The keyword arguments of
that call hold the memory; calling the decoder again with other queries in their place is `decode`. Nothing is
recomputed, gradients reach the backbone, and no buffer of the model changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..criterion import Denoising, DetectionCriterion
from ..outputs import (
    BatchTotals,
    DetectorOutput,
    DetectorSpec,
    FeatureMap,
    ObjectQueries,
    Predictions,
    Targets,
)


@dataclass
class DecoderCall:
    """What one forward pass left behind: the base model's output, the decoder's keyword arguments and output, the
    projected maps that enter the encoder, and the pixel mask."""

    arguments: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    necks: list[Tensor] = field(default_factory=list)
    model_output: Any = None
    pixel_mask: Tensor | None = None


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

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.spec = self.spec_of(model.config)
        self.criterion = self.criterion_of(model.config)

    # --- what a family answers ---------------------------------------------------------------------------------------

    @staticmethod
    def spec_of(config: PreTrainedConfig) -> DetectorSpec:
        """What methods need to know before the first image."""
        raise NotImplementedError

    @staticmethod
    def criterion_of(config: PreTrainedConfig) -> DetectionCriterion:
        """The family's detection loss."""
        raise NotImplementedError

    def necks(self) -> list[nn.Module]:
        """Modules whose outputs, in order, are the projected maps that enter the encoder."""
        raise NotImplementedError

    def own_queries(self, call: DecoderCall) -> ObjectQueries:
        """The queries that the model asked in this pass, without denoising rows."""
        raise NotImplementedError

    def place(self, queries: ObjectQueries, call: DecoderCall) -> dict[str, Any]:
        """Decoder arguments that ask these queries; merged over the captured ones."""
        raise NotImplementedError

    def read(self, output: Any, arguments: dict[str, Any]) -> tuple[Predictions, ...]:
        """Every layer's predictions from a decoder's output, denoising rows included."""
        raise NotImplementedError

    def denoising_groups(self, call: DecoderCall) -> tuple[int, int]:
        """Number of denoising rows in front of the own queries, and the number of their groups."""
        return 0, 0

    def encoder_proposals(self, call: DecoderCall) -> Predictions | None:
        """Predictions of a two-stage encoder that the detection loss supervises."""
        return None

    # --- the two verbs -----------------------------------------------------------------------------------------------

    def __call__(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        targets: Targets | None = None,
        totals: BatchTotals | None = None,
    ) -> tuple[DetectorOutput, dict[str, Tensor]]:
        """Encodes a batch and asks the model's own queries.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised for this model.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*): 1 where a pixel is real.
            targets ([`Targets`], *optional*): with them the detection loss is computed.
            totals ([`BatchTotals`], *optional*): divisors of the loss; default: of this batch alone.

        Returns:
            `tuple[DetectorOutput, dict[str, torch.Tensor]]`: the pass, and the weighted parts of its detection loss
            (empty without targets).

        Raises:
            ValueError: a `pixel_mask` for a family that cannot mask padding.
        """
        if pixel_mask is not None and not self.uses_pixel_mask:
            raise ValueError(
                f"{self.spec.family} sees padding as image, but the batch is padded: resize to a fixed size instead."
            )
        with self._captured() as call, _straight_gradients(self.model, pixel_values):
            labels = {} if targets is None else self._denoising_labels(targets)
            call.model_output = self.model.model(pixel_values, pixel_mask=pixel_mask, **labels, **self.decoder_options)
        call.pixel_mask = pixel_mask
        rows, groups = self.denoising_groups(call)
        answers = self.read(call.output, call.arguments)
        layers = tuple(_rows(answer, rows, None) for answer in answers)
        losses: dict[str, Tensor] = {}
        if targets is not None:
            totals = totals or BatchTotals.of(targets.counts, layers[-1].logits.shape[1])
            denoising = Denoising(tuple(_rows(a, 0, rows) for a in answers), groups) if rows else None
            losses = self.criterion(layers, targets, totals, self.encoder_proposals(call), denoising)
        output = DetectorOutput(
            layers=layers,
            queries=self.own_queries(call),
            features={"neck": self._maps(call, call.necks), "encoder": self._maps(call, self._memory(call))},
            decode=partial(self._decode, call),
            loss=torch.stack(list(losses.values())).sum() if losses else None,
        )
        return output, losses

    def _decode(self, call: DecoderCall, queries: ObjectQueries) -> tuple[Predictions, ...]:
        arguments = call.arguments | self.place(queries, call)
        return self.read(self.model.model.decoder(**arguments), arguments)

    def _denoising_labels(self, targets: Targets) -> dict[str, Any]:
        """Labels for families that make denoising queries from them."""
        return {}

    @contextmanager
    def _captured(self) -> Iterator[DecoderCall]:
        call, decoder = DecoderCall(), self.model.model.decoder

        def keep_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            call.arguments = dict(kwargs)

        def keep_output(module: nn.Module, args: tuple, output: Any) -> None:
            call.output = output

        def keep_neck(module: nn.Module, args: tuple, output: Tensor) -> None:
            call.necks.append(output)

        handles = [decoder.register_forward_pre_hook(keep_arguments, with_kwargs=True)]
        handles.append(decoder.register_forward_hook(keep_output))
        handles.extend(neck.register_forward_hook(keep_neck) for neck in self.necks())
        try:
            yield call
        finally:
            for handle in handles:
                handle.remove()

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
        prefix = "model.backbone."
        return [(name, p) for name, p in self.model.named_parameters() if name.startswith(prefix)]


def _rows(predictions: Predictions, start: int, stop: int | None) -> Predictions:
    states = predictions.hidden_states
    return Predictions(
        predictions.logits[:, start:stop],
        predictions.boxes[:, start:stop],
        None if states is None else states[:, start:stop],
        predictions.activation,
    )


@contextmanager
def _straight_gradients(model: nn.Module, pixel_values: Tensor) -> Iterator[None]:
    """Guards the gradients of a single image on CPU: there torch's BatchNorm (2.15) misreads a gradient that arrives
    transposed, as it does from every flattened map, and sends a wrong one on."""

    def straighten(module: nn.Module, args: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(Tensor.contiguous)

    alone = pixel_values.shape[0] == 1 and pixel_values.device.type == "cpu"
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)] if alone else []
    handles = [norm.register_forward_hook(straighten) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inverse_sigmoid(values: Tensor, eps: float = 1e-5) -> Tensor:
    """Logits of numbers in [0, 1], in float32: 16-bit arithmetic turns 1 into infinity."""
    return torch.logit(values.float(), eps)


def take_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """Tokens `(batch_size, num_tokens, width)` at `rows` `(batch_size, num_rows)`."""
    return tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[-1]))
