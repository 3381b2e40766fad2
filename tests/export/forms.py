"""Images for an exported file, and its answers."""

from __future__ import annotations

import onnx
import onnxruntime
import torch


SIZE = 128  # with less, Deformable DETR's fourth level is one pixel, which GroupNorm refuses


def pixels(count=3, seed=0, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    return {f"image {i}": torch.rand(3, size, size, generator=generator) for i in range(count)}


def run_onnx(file, batch):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(answer) for answer in session.run(None, {"pixel_values": batch.numpy()})]


def assert_same_answers(model, file, logits=1e-3, boxes=1e-4):
    """Logits and boxes, row by row, of batches of 1, 2 and 3 images that the export has not seen."""
    for count in (1, 2, 3):
        batch = torch.stack(list(pixels(count, seed=count).values()))
        with torch.no_grad():
            expected = model(pixel_values=batch)
        assert expected.pred_boxes.any()
        found = run_onnx(file, batch)
        assert [tuple(answer.shape) for answer in found] == [expected.logits.shape, expected.pred_boxes.shape]
        torch.testing.assert_close(found[0], expected.logits, atol=logits, rtol=1e-3)
        torch.testing.assert_close(found[1], expected.pred_boxes, atol=boxes, rtol=1e-3)


def opset_of(file):
    """Version of ONNX's own operators in a file."""
    return next(entry.version for entry in onnx.load(str(file)).opset_import if not entry.domain)
