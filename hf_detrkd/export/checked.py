"""Exports a detector to an ONNX file for onnxruntime, checked against PyTorch before it gets its final name.

The file takes `pixel_values` `(batch, 3, height, width)` from the image processor, any number of images of one size
without padding, and returns `logits` and `pred_boxes` like the model: post-processing is left to the processor.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from .graph import export_onnx
from .packages import convert_float_to_float16, onnx
from .parity import FLOAT16, FLOAT32, Heads, OnnxExportError, OnnxParityError, Tolerance, check_parity, onnx_heads


MODEL, MODEL_FP16, UNCHECKED = "model.onnx", "model_fp16.onnx", "unchecked.onnx"
CHECKED_BATCHES = (1, 3)  # neither is the traced one


def to_float16(source: str | Path, target: str | Path) -> None:
    """Writes a file with 16-bit weights and arithmetic; inputs and outputs stay in float32.

    Args:
        source (`str` or `Path`): float32 ONNX file.
        target (`str` or `Path`)
    """
    converted = convert_float_to_float16(onnx.load(str(source)), keep_io_types=True)
    onnx.save(converted, str(target))


def export_checked(
    model: PreTrainedModel,
    folder: str | Path,
    images: Mapping[str, Tensor],
    opset: int | None = None,
    fp16: bool = False,
    threads: int = 0,
) -> dict[str, Any]:
    """Exports a detector and compares the file with it on real images, with batch sizes that were not traced.

    Earlier files of the same names are removed first; a file that fails the check is kept as `<name>.failed.onnx`.

    Args:
        model ([`~transformers.PreTrainedModel`]): see [`export_onnx`].
        folder (`str` or `Path`): folder for `model.onnx` and `model_fp16.onnx`.
        images (`dict[str, torch.Tensor]`): by name, `(3, height, width)`, all of the exported size.
        opset (`int`, *optional*): see [`export_onnx`].
        fp16 (`bool`): also write a file in 16 bits.
        threads (`int`): threads of onnxruntime; 0 for its default.

    Returns:
        `dict`: `opset`, `exporter`, `dynamic_batch`, `image_size`, and `files`: by name `megabytes` (1e6 bytes) and
        `parity`, see [`Parity.as_dict`].

    Raises:
        OnnxExportError: the model cannot be exported, or onnxruntime cannot run the file.
        OnnxParityError: the outputs differ from the model's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MODEL, MODEL_FP16, UNCHECKED):
        (folder / name).unlink(missing_ok=True)
    height, width = next(iter(images.values())).shape[-2:]
    draft = folder / UNCHECKED
    made = export_onnx(model, draft, (height, width), opset)
    files = {MODEL: _checked(model, draft, folder / MODEL, images, FLOAT32, threads)}
    if fp16:
        files[MODEL_FP16] = export_float16(model, folder, images, threads)
    return {"image_size": [height, width], **asdict(made), "files": files}


def export_float16(
    model: PreTrainedModel, folder: str | Path, images: Mapping[str, Tensor], threads: int = 0
) -> dict[str, Any]:
    """Writes and checks `model_fp16.onnx` from the folder's `model.onnx`: see [`export_checked`], which does both."""
    draft, target = Path(folder) / UNCHECKED, Path(folder) / MODEL_FP16
    to_float16(Path(folder) / MODEL, draft)
    return _checked(model, draft, target, images, FLOAT16, threads)


def _checked(
    model: PreTrainedModel, draft: Path, target: Path, images: Mapping[str, Tensor], tolerance: Tolerance, threads: int
) -> dict[str, Any]:
    """Compares a file with its model and renames it to its final name."""
    try:
        found = onnx_heads(draft, threads)
        parity = check_parity(torch_heads(model), found, images, model.config.num_labels, CHECKED_BATCHES, tolerance)
        parity.raise_if_beyond()
    except (OnnxExportError, OnnxParityError) as error:
        failed = draft.replace(target.with_name(f"{target.stem}.failed.onnx"))
        raise type(error)(f"{error} The file is kept as {failed}.") from error
    draft.replace(target)
    return {"megabytes": target.stat().st_size / 1e6, "parity": parity.as_dict()}


def torch_heads(model: PreTrainedModel) -> Heads:
    """A model as a function with the interface of [`onnx_heads`]."""

    def answer(pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model(pixel_values=pixel_values)
        return outputs.logits, outputs.pred_boxes

    return answer


def megabytes(model: PreTrainedModel) -> float:
    """Size of the weights as saved by `save_pretrained`, in 1e6 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6


def fixed_size_processor(processor: Any, image_size: tuple[int, int] | None = None) -> tuple[Any, tuple[int, int]]:
    """A copy of an image processor that resizes every image to the input size of the ONNX file, without padding.

    Args:
        processor: image processor of transformers.
        image_size (`tuple[int, int]`, *optional*): height and width in pixels; default: the processor's.

    Returns:
        The processor, and height and width.

    Raises:
        ValueError: the processor keeps the aspect ratio and no size is given.
    """
    size = dict(processor.size)
    if image_size is None:
        if set(size) != {"height", "width"}:
            raise ValueError(
                f"An ONNX file takes images of one size without padding, but the image processor keeps their aspect "
                f"ratio and pads ({size}): set --image_size HEIGHTxWIDTH, to which images are then stretched."
            )
        image_size = size["height"], size["width"]
    fixed = copy.deepcopy(processor)
    fixed.size = {"height": image_size[0], "width": image_size[1]}
    fixed.do_resize, fixed.do_pad = True, False
    return fixed, image_size


def pixels_of(processor: Any, images: Mapping[str, Image.Image], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """Pixel values of images from a processor, by name, `(3, height, width)`.

    Raises:
        ValueError: an image gets another size.
    """
    pixels = {
        name: processor(images=[image], return_tensors="pt")["pixel_values"][0] for name, image in images.items()
    }
    for name, values in pixels.items():
        if tuple(values.shape) != (3, *image_size):
            raise ValueError(
                f"The image processor must make images of {image_size[0]}x{image_size[1]} pixels, but makes {name} "
                f"{tuple(values.shape)}: set --image_size HEIGHTxWIDTH to the processor's size."
            )
    return pixels
