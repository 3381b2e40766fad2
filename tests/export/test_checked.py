"""An exported file answers as its detector does, for any number of images; one that does not never gets its name."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import DetrImageProcessor, RTDetrImageProcessor

from hf_detrkd.export import checked as export
from hf_detrkd.export.checked import export_checked, fixed_size_processor, pixels_of
from hf_detrkd.export.graph import OnnxExport, export_onnx
from hf_detrkd.export.parity import OnnxExportError, OnnxParityError, check_parity, onnx_heads
from tests import tiny
from tests.export.forms import SIZE, assert_same_answers, pixels, run_onnx


QUICK = {  # small graphs; RT-DETR goes through the script
    "detr": {"encoder_layers": 1, "decoder_layers": 1},
    "faster_rcnn": {
        "options": {"box_detections_per_img": 20, "rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 60}
    },
}
SLOW = tuple(name for name in tiny.DETECTORS if name not in QUICK)


@pytest.fixture(scope="module", params=list(QUICK))
def made(request, tmp_path_factory):
    """A family's model, the folder of its file, and the report."""
    model, folder = tiny.build(request.param, **QUICK[request.param]), tmp_path_factory.mktemp("made")
    return model, folder, export_checked(model, folder, pixels(), threads=1)


def test_any_number_of_images_gets_the_answers_of_the_model(made):
    model, folder, report = made
    assert_same_answers(model, folder / "model.onnx")
    assert report["files"]["model.onnx"]["parity"]["batch_sizes"] == [1, 3]


def test_other_weights_than_the_exported_ones_are_found_out(made):
    model, folder, _ = made
    heads = onnx_heads(folder / "model.onnx", 1)
    num_classes = model.config.num_labels
    check_parity(export.torch_heads(model), heads, pixels(), num_classes, (1, 3)).raise_if_beyond()
    other = copy.deepcopy(model)
    with torch.no_grad():
        [bias for name, bias in other.named_parameters() if "bbox" in name and name.endswith("bias")][-1].add_(0.5)
    with pytest.raises(OnnxParityError, match=r"within 0\.0001 for scores .* differ more: image \d in a batch"):
        check_parity(export.torch_heads(other), heads, pixels(), num_classes, (1, 3)).raise_if_beyond()


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_other_family_exports_too(name, tmp_path):
    model = tiny.build(name)
    report = export_checked(model, tmp_path, pixels(), threads=1)
    assert report["dynamic_batch"] and report["files"]["model.onnx"]["parity"]["unpaired"] == 0
    assert_same_answers(model, tmp_path / "model.onnx")


@pytest.mark.slow
def test_an_image_on_which_faster_rcnn_finds_nothing_is_no_error(tmp_path):
    model = tiny.build("faster_rcnn", **QUICK["faster_rcnn"])
    model.roi_heads.score_thresh = 1.0
    export_checked(model, tmp_path, pixels(), threads=1)
    logits, boxes = run_onnx(tmp_path / "model.onnx", torch.rand(2, 3, SIZE, SIZE))
    assert not boxes.any() and (logits.argmax(-1) == model.config.num_labels).all()


def test_a_file_with_other_answers_is_kept_under_another_name(made, tmp_path, monkeypatch):
    model, folder, _ = made
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def another_model(model, draft, image_size, opset):
        shutil.copy(folder / "model.onnx", draft)
        return OnnxExport(20, True)

    monkeypatch.setattr(export, "export_onnx", another_model)
    (tmp_path / "model.onnx").write_text("of an earlier export")
    with pytest.raises(OnnxParityError, match=r"image \d in a batch of .* kept as .*model\.failed\.onnx"):
        export_checked(other, tmp_path, pixels(), threads=1)
    assert [file.name for file in tmp_path.iterdir()] == ["model.failed.onnx"]


def test_a_file_that_onnxruntime_cannot_run_is_no_export(tmp_path, monkeypatch):
    def broken(model, draft, image_size, opset):
        Path(draft).write_bytes(b"no graph")
        return OnnxExport(20, True)

    monkeypatch.setattr(export, "export_onnx", broken)
    with pytest.raises(OnnxExportError, match=r"onnxruntime cannot load the file: .* kept as .*model\.failed\.onnx"):
        export_checked(tiny.build("yolos"), tmp_path, pixels())


def test_what_has_no_onnx_operator_is_named(tmp_path, monkeypatch):
    model = tiny.build("yolos", num_hidden_layers=2)
    linear = model.class_labels_classifier.forward
    monkeypatch.setattr(
        model.class_labels_classifier,
        "forward",
        lambda states: linear(states + torch.linalg.svdvals(states)[:, :, None].sum(1, keepdim=True)),
    )
    with pytest.raises(OnnxExportError, match=r"A yolos cannot be exported to ONNX: .* fails: .*svd"):
        export_onnx(model, tmp_path / "model.onnx", (SIZE, SIZE))


def test_a_model_that_trains_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match=r"in training mode: call model\.float\(\)\.cpu\(\)\.eval\(\)"):
        export_onnx(tiny.build("yolos").train(), tmp_path / "model.onnx", (SIZE, SIZE))
    with pytest.raises(ValueError, match=r"got torch\.float16 on cpu"):
        export_onnx(tiny.build("yolos").half(), tmp_path / "model.onnx", (SIZE, SIZE))


def test_a_processor_that_pads_needs_a_size():
    with pytest.raises(ValueError, match=r"keeps their aspect ratio and pads .* set --image_size HEIGHTxWIDTH"):
        fixed_size_processor(DetrImageProcessor())


def test_with_a_size_images_of_any_shape_become_it_unpadded():
    processor, size = fixed_size_processor(DetrImageProcessor(), (48, 80))
    images = {"wide": Image.new("RGB", (90, 30), "red"), "high": Image.new("RGB", (30, 90), "red")}
    values = pixels_of(processor, images, size)
    assert size == (48, 80) and {tuple(x.shape) for x in values.values()} == {(3, 48, 80)}
    torch.testing.assert_close(values["wide"], values["high"])  # no black border on either
    assert (
        "pixel_mask" not in processor(images=[images["wide"]], return_tensors="pt")
        or processor(images=[images["wide"]], return_tensors="pt")["pixel_mask"].all()
    )


def test_a_processor_is_copied_and_not_changed():
    own = RTDetrImageProcessor(size={"height": 64, "width": 96})
    _, size = fixed_size_processor(own)
    fixed_size_processor(own, (32, 32))
    assert size == (64, 96) and dict(own.size) == {"height": 64, "width": 96}


def test_a_processor_with_another_size_than_it_says_is_refused():
    processor = RTDetrImageProcessor(size={"height": 64, "width": 96})
    with pytest.raises(ValueError, match=r"must make images of 64x64 pixels, but makes a \(3, 64, 96\)"):
        pixels_of(processor, {"a": Image.new("RGB", (10, 10))}, (64, 64))
