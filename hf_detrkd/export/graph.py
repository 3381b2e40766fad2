"""Exports a detector to ONNX with a dynamic batch size, using torch's exporter."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models import FasterRCNNForObjectDetection
from .packages import ClearMetadataAndDocStringPass, onnx, onnx_ir
from .parity import OnnxExportError
from .region_heads import RegionHeads


TRACED_BATCH = 2  # with 1, torch.export treats the batch size as a constant
EXPORTER = "torch.onnx.export(dynamo=True)"
NO_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"


class ModelHeads(nn.Module):
    """A set-prediction detector as a function of only images."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(pixel_values=pixel_values)
        return outputs.logits, outputs.pred_boxes


@dataclass(frozen=True)
class OnnxExport:
    """Facts of an exported ONNX file: the opset, whether the batch size is dynamic, and the exporter."""

    opset: int
    dynamic_batch: bool
    exporter: str = EXPORTER


def export_onnx(
    model: PreTrainedModel, file: str | Path, image_size: tuple[int, int], opset: int | None = None
) -> OnnxExport:
    """Writes a detector as one ONNX file with weights, without a parity check: see [`export_checked`].

    Args:
        model ([`~transformers.PreTrainedModel`]): on the CPU, in float32 and eval mode.
        file (`str` or `Path`)
        image_size (`tuple[int, int]`): height and width in pixels, fixed in the file.
        opset (`int`, *optional*): version of the operator set; default: that of torch's exporter.

    Raises:
        ValueError: the model is on another device, in 16 bits or in training mode.
        OnnxExportError: torch or onnx cannot write it.
    """
    if model.training or model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(
            f"ONNX export needs a model in eval mode, float32 and on the CPU, got {model.dtype} on {model.device}"
            f"{' in training mode' if model.training else ''}: call model.float().cpu().eval()."
        )
    example = torch.rand(TRACED_BATCH, 3, *image_size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), traceable(model):
            graph = torch.export.export(
                heads_of(model, example),
                (example,),
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
                strict=False,
            )
            program = torch.onnx.export(
                graph,
                dynamo=True,
                input_names=["pixel_values"],
                output_names=["logits", "pred_boxes"],
                opset_version=opset,
                verbose=False,
            )
        assert program is not None
        adopt_constants(program.model.graph)
        ClearMetadataAndDocStringPass()(program.model)  # it contains local paths
        program.save(str(file))
        onnx.checker.check_model(str(file))
    except Exception as error:  # every layer of the exporter has its own error types
        raise OnnxExportError(
            f"A {model.config.model_type} cannot be exported to ONNX: {EXPORTER} fails: {reason_of(error)}"
        ) from error
    (images,) = program.model.graph.inputs
    return OnnxExport(program.model.opset_imports[""], images.shape is not None and images.shape.is_dynamic(0))


def heads_of(model: PreTrainedModel, example: Tensor) -> nn.Module:
    """The model as a module from images to logits and boxes, after one pass that creates its lazy parts."""
    model(example)
    return RegionHeads(model) if isinstance(model, FasterRCNNForObjectDetection) else ModelHeads(model)


@contextmanager
def traceable(model: PreTrainedModel) -> Iterator[None]:
    """Temporarily disables model code that a graph cannot represent.

    `len(tensor)` is a plain number, which would fix the graph to the traced batch size: it is replaced by the symbolic
    size of torch.export. Checks of values (`torch_compilable_check`) have no ONNX operator, and transformers has a
    switch to disable them. The exporter's warnings are about operators that this graph does not use.
    """
    logger, names = logging.getLogger("torch.onnx"), vars(sys.modules[type(model).__module__])
    level, checks = logger.level, os.environ.get(NO_CHECKS)
    logger.setLevel(logging.ERROR)
    names["len"], os.environ[NO_CHECKS] = open_length, "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        del names["len"]
        logger.setLevel(level)
        if checks is None:
            del os.environ[NO_CHECKS]
        else:
            os.environ[NO_CHECKS] = checks


def open_length(values: Any) -> Any:
    """`len`, but symbolic for tensors under torch.export."""
    return values.shape[0] if isinstance(values, Tensor) else len(values)


def adopt_constants(graph: onnx_ir.Graph) -> None:
    """Registers constants in the graph that onnxscript added only to a merged Clip, as its bounds."""
    for value in [value for node in graph.all_nodes() for value in node.inputs]:
        if value is None or value.name is None or value.const_value is None:
            continue
        if value.producer() is None and not value.is_graph_input() and value.name not in graph.initializers:
            graph.register_initializer(value)


def reason_of(error: BaseException) -> str:
    """The root cause of an exporter's error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}"
