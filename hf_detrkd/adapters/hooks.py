"""What is hooked into a model for one pass, and taken out again: to see what passes by, and to change it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass
class DecoderCall:
    """What one forward pass left behind: the base model's output, the decoder's keyword arguments and output, the
    projected maps that enter the encoder, the pixel mask, and transformers' own loss where it was asked for."""

    arguments: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    necks: list[Tensor] = field(default_factory=list)
    model_output: Any = None
    pixel_mask: Tensor | None = None
    losses: dict[str, Tensor] | None = None


@contextmanager
def captured(
    model: nn.Module, decoder: nn.Module, necks: Iterable[nn.Module], maps_of: Callable[[Any], list[Tensor]]
) -> Iterator[DecoderCall]:
    """Fills a [`DecoderCall`] with the forward pass that runs inside.

    Args:
        model, decoder (`torch.nn.Module`): the base model, and its decoder.
        necks (`Iterable[torch.nn.Module]`): see [`DetectorAdapter.necks`].
        maps_of (`Callable`): see [`DetectorAdapter.neck_maps`].
    """
    call = DecoderCall()

    def keep_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call.arguments = dict(kwargs)

    def keep_output(module: nn.Module, args: tuple, output: Any) -> None:
        call.output = output

    def keep_model_output(module: nn.Module, args: tuple, output: Any) -> None:
        call.model_output = output

    def keep_neck(module: nn.Module, args: tuple, output: Any) -> None:
        call.necks.extend(maps_of(output))

    handles = [decoder.register_forward_pre_hook(keep_arguments, with_kwargs=True)]
    handles.append(decoder.register_forward_hook(keep_output))
    handles.append(model.register_forward_hook(keep_model_output))
    handles.extend(neck.register_forward_hook(keep_neck) for neck in necks)
    try:
        yield call
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def apart(layers: Iterable[Any], groups: Tensor, mask_argument: str) -> Iterator[None]:
    """Queries of different groups do not see each other in the self-attention of a decoder's layers.

    The layers keep their activations meanwhile: recomputed in the backward pass, they would see no mask.

    Args:
        layers (`Iterable[torch.nn.Module]`): of the decoder.
        groups (`torch.LongTensor` of shape `(batch_size, num_queries)`): see [`ObjectQueries`].
        mask_argument (`str`): of the self-attention, what is added to its logits.
    """
    layers, strangers = list(layers), (groups[:, :, None] != groups[:, None])[:, None]

    def add_mask(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        states = args[0] if args else kwargs["hidden_states"]
        mask = torch.zeros(strangers.shape, dtype=states.dtype, device=states.device)
        return args, kwargs | {mask_argument: mask.masked_fill(strangers, -torch.inf)}

    handles = [layer.self_attn.register_forward_pre_hook(add_mask, with_kwargs=True) for layer in layers]
    checkpointed = [x for x in layers if isinstance(x, GradientCheckpointingLayer) and x.gradient_checkpointing]
    for layer in checkpointed:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in checkpointed:
            layer.gradient_checkpointing = True


@contextmanager
def straight_gradients(model: nn.Module, pixel_values: Tensor) -> Iterator[None]:
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
