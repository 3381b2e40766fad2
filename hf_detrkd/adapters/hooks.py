"""Temporary forward hooks that capture or modify one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass
class DecoderCall:
    """Values captured in one forward pass.

    Attributes:
        arguments, output: keyword arguments and output of the decoder.
        necks: projected maps that enter the encoder.
        model_output: output of the base model.
        pixel_mask: mask of the images, if given.
        losses: the model's own loss, if requested.
        projections: input and output of the decoder's projections of its memory, see [`projected_once`].
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    necks: list[Tensor] = field(default_factory=list)
    model_output: Any = None
    pixel_mask: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    projections: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)


@contextmanager
def captured(
    model: nn.Module, decoder: nn.Module, necks: Iterable[nn.Module], maps_of: Callable[[Any], list[Tensor]]
) -> Iterator[DecoderCall]:
    """Fills a [`DecoderCall`] with the forward pass that runs inside the context.

    Args:
        model, decoder (`torch.nn.Module`): the base model and its decoder.
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

    def keep_projection(module: nn.Module, args: tuple, output: Tensor) -> None:
        call.projections[module] = args[0], output

    handles = [decoder.register_forward_pre_hook(keep_arguments, with_kwargs=True)]
    handles.extend(one.register_forward_hook(keep_projection) for one in projections_of(decoder))
    handles.append(decoder.register_forward_hook(keep_output))
    handles.append(model.register_forward_hook(keep_model_output))
    handles.extend(neck.register_forward_hook(keep_neck) for neck in necks)
    try:
        yield call
    finally:
        for handle in handles:
            handle.remove()


def projections_of(decoder: nn.Module) -> list[nn.Module]:
    """What projects the memory in deformable attention. Not in layers that are compiled, or computed again in the
    backward pass, which may run without hooks."""
    layers = list(getattr(decoder, "layers", []))
    if any("forward" in vars(layer) or getattr(layer, "gradient_checkpointing", False) for layer in layers):
        return []
    return [module for name, module in decoder.named_modules() if name.rpartition(".")[2] == "value_proj"]


@contextmanager
def projected_once(projections: Mapping[nn.Module, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside the context, projections of the same memory are not computed again: half of a pass with few queries."""

    def known(own: Callable[[Tensor], Tensor], given: Tensor, output: Tensor, states: Tensor) -> Tensor:
        return output if states is given else own(states)

    for module, (given, output) in projections.items():
        module.forward = partial(known, module.forward, given, output)
    try:
        yield
    finally:
        for module in projections:
            vars(module).pop("forward", None)


@contextmanager
def apart(layers: Iterable[Any], groups: Tensor, mask_argument: str) -> Iterator[None]:
    """Masks the self-attention of a decoder's layers between queries of different groups.

    Gradient checkpointing is disabled inside the context: layers recomputed in the backward pass would lack the mask.

    Args:
        layers (`Iterable[torch.nn.Module]`): the decoder's layers.
        groups (`torch.LongTensor` of shape `(batch_size, num_queries)`): see [`ObjectQueries`].
        mask_argument (`str`): argument of the self-attention for the additive attention mask.
    """
    # strangers: (batch_size, 1, num_queries, num_queries), true for pairs of different groups
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
    """Works around wrong gradients for a single image on CPU: there torch's BatchNorm (2.15) misreads a transposed
    gradient, which every flattened map produces, and propagates a wrong one."""

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
