"""DINO saved and loaded, in a pipeline, with activation checkpointing, and in sixteen bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from hf_detrkd.models import DinoDetrForObjectDetection
from tests import tiny
from tests.models.apart import answers_apart
from tests.models.dino_detr import DECODED, Build, assert_same_gradients, gradients, run


def test_a_saved_model_loads_here_and_where_this_package_is_not_installed(build: Build, tmp_path: Path) -> None:
    model, inputs = build("dino_detr"), tiny.batch(128, padded=True)
    inputs.pop("labels")
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = model(**inputs)
        again = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "saved")
        assert type(again) is DinoDetrForObjectDetection
        assert torch.equal(again(**inputs).logits, expected.logits)
    logits, boxes = answers_apart(tmp_path, inputs)
    assert torch.equal(logits, expected.logits) and torch.equal(boxes, expected.pred_boxes)


def test_the_pipeline_finds_objects(build: Build, tmp_path: Path) -> None:
    build("dino_detr").save_pretrained(tmp_path)
    transformers.DeformableDetrImageProcessor(size={"height": 128, "width": 128}).save_pretrained(tmp_path)
    pipeline = transformers.pipeline("object-detection", str(tmp_path))
    found = pipeline(Image.new("RGB", (90, 60), "red"), threshold=0.0)
    assert len(found) == tiny.NUM_QUERIES * tiny.NUM_CLASSES
    assert {entry["label"] for entry in found} == set(tiny.LABELS)


def test_activation_checkpointing_computes_layers_again_and_changes_no_gradient(build: Build) -> None:
    def outcome(checkpointed: bool) -> tuple[list[Tensor], int]:
        model, calls = build("dino_detr").train().requires_grad_(True), []
        if checkpointed:
            # Later versions call it activation checkpointing.
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
            layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
        return gradients(run(model, tiny.batch(128)).loss, model), len(calls)

    (plain, calls), (found, calls_again) = outcome(False), outcome(True)
    assert calls_again == 2 * calls > 0
    assert_same_gradients(found, plain, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_sixteen_bits_stay_finite(build: Build, dtype: torch.dtype, training: bool) -> None:
    model = build("dino_detr").train(training).requires_grad_(True)
    inputs = tiny.batch(128, padded=True)
    with torch.autocast("cpu", dtype):
        output = run(model, inputs)
    assert output.logits.dtype == dtype and output.pred_boxes.dtype == output.loss.dtype == torch.float32
    assert all(output[name].isfinite().all() for name in (*DECODED, "loss", "enc_topk_bboxes"))
    assert all(gradient.isfinite().all() for gradient in gradients(output.loss, model))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_a_model_whose_weights_have_sixteen_bits_answers(build: Build, dtype: torch.dtype, training: bool) -> None:
    model = build("dino_detr").to(dtype).train(training)
    inputs = tiny.batch(128, padded=True)
    output = run(model, inputs | {"pixel_values": inputs["pixel_values"].to(dtype)})
    assert all(output[name].isfinite().all() for name in (*DECODED, "loss", "enc_topk_bboxes"))
