"""`export.py`: its files, its report, its arguments."""

from __future__ import annotations

import contextlib
import io
import json
import re

import onnx
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from hf_detrkd.cli import export
from hf_detrkd.data import load_detection_split
from hf_detrkd.data.shapes import SHAPE_CLASSES
from tests import ROOT
from tests.export.forms import SIZE, assert_same_answers, opset_of, run_onnx


SCRIPTS = ROOT / "scripts"
TEACHER = SCRIPTS / "recipes" / "quickstart" / "teacher"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Four drawn images, and what `export.py` made of the quickstart's teacher, which knows what is on them."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "images").mkdir()
    for i, record in enumerate(load_detection_split("shapes", max_samples=4, shapes_size=(90, 120)).records):
        record.load().save(folder / "images" / f"{i}.png")
    arguments = ["--model_name_or_path", TEACHER, "--output_dir", folder / "onnx", "--fp16", "--threads", "1"]
    arguments += ["--input", folder / "images", "--runs", "2", "--batch_size", "2"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        export.main([str(word) for word in arguments])
    return folder, printed.getvalue()


def test_the_script_writes_the_files_a_user_needs_and_nothing_unchecked(exported):
    names = {file.name for file in (exported[0] / "onnx").iterdir()}
    assert names == {"model.onnx", "model_fp16.onnx", "config.json", "preprocessor_config.json", "export.json"}


def test_the_exported_file_answers_like_the_saved_model_for_any_number_of_images(exported):
    model = AutoModelForObjectDetection.from_pretrained(TEACHER, dtype=torch.float32).eval()
    assert_same_answers(model, exported[0] / "onnx" / "model.onnx")


def test_processor_and_config_beside_the_file_turn_its_answers_into_named_boxes(exported):
    folder = exported[0]
    processor = AutoImageProcessor.from_pretrained(folder / "onnx")
    image = Image.open(folder / "images" / "1.png")
    batch = processor(images=[image], return_tensors="pt")["pixel_values"]
    assert batch.shape == (1, 3, SIZE, SIZE)
    logits, boxes = run_onnx(folder / "onnx" / "model.onnx", batch)
    outputs = type("Outputs", (), {"logits": logits, "pred_boxes": boxes})
    (found,) = processor.post_process_object_detection(outputs, 0.5, [(image.height, image.width)])
    names = json.loads((folder / "onnx" / "config.json").read_text())["id2label"]
    assert len(found["labels"]) > 0
    assert {names[str(label)] for label in found["labels"].tolist()} <= set(SHAPE_CLASSES)


def test_the_example_of_the_guide_finds_what_the_processor_finds(exported, capsys):
    folder = exported[0]
    guide = (ROOT / "docs" / "sharing.md").read_text().partition("## ONNX")[2]
    example = guide.partition("```python\n")[2].partition("```")[0]
    assert "torch" not in example and "transformers" not in example
    places = {"outputs/onnx": str(folder / "onnx"), "photo.jpg": str(folder / "images" / "1.png")}
    for given, place in places.items():
        example = example.replace(given, place)
    exec(compile(example, "sharing.md", "exec"), {})
    printed = re.findall(r"^(\w+) 0\.\d\d \[(.*)\]$", capsys.readouterr().out, re.MULTILINE)

    model = AutoModelForObjectDetection.from_pretrained(TEACHER, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder / "onnx")
    image = Image.open(folder / "images" / "1.png").convert("RGB")
    with torch.no_grad():
        outputs = model(**processor(images=[image], return_tensors="pt"))
    (found,) = processor.post_process_object_detection(outputs, 0.5, [(image.height, image.width)])
    assert sorted(name for name, _ in printed) == sorted(model.config.id2label[x] for x in found["labels"].tolist())
    boxes = torch.tensor([[float(x) for x in box.split(", ")] for _, box in printed])
    nearest = torch.cdist(boxes, found["boxes"], p=torch.inf).min(dim=1).values
    assert len(boxes) > 0 and nearest.max() < 3  # pixels: Pillow and torchvision resize a little differently


def test_the_report_holds_what_was_measured(exported):
    folder, done = exported
    report = json.loads((folder / "onnx" / "export.json").read_text())
    assert report["model"] == str(TEACHER) and report["family"] == "rt_detr"
    assert report["image_size"] == [SIZE, SIZE] and report["dynamic_batch"] is True and report["threads"] == 1
    assert report["opset"] == opset_of(folder / "onnx" / "model.onnx") >= 18
    assert report["exporter"] == "torch.onnx.export(dynamo=True)"
    assert set(report["versions"]) == {"torch", "transformers", "onnx", "onnxscript", "onnxruntime"}
    assert report["machine"].endswith("1 thread")
    assert report["pytorch"]["megabytes"] == pytest.approx(4 * report["parameters"] / 1e6, rel=0.03)
    for name, file in report["files"].items():
        assert file["megabytes"] == (folder / "onnx" / name).stat().st_size / 1e6
        parity = file["parity"]
        assert parity["images"] == 4 and parity["batch_sizes"] == [1, 3] and parity["unpaired"] == 0
        assert 0 <= parity["scores"] <= parity["tolerance"]["scores"]
        assert 0 <= parity["boxes"] <= parity["tolerance"]["boxes"]
        assert parity["worst"]["image"] in {f"{i}.png" for i in range(4)}
    for latency in (report["pytorch"]["latency"], *(file["latency"] for file in report["files"].values())):
        assert set(latency) == {"1", "2"}
        for batch, figures in latency.items():
            assert 0 < figures["low_ms"] <= figures["median_ms"] <= figures["high_ms"]
            assert figures["images_per_second"] == pytest.approx(1e3 * int(batch) / figures["median_ms"])
    assert "model.onnx: " in done and "on 4 images in batches of 1 and 3" in done


def test_sixteen_bits_halve_the_file_and_keep_images_and_answers_in_float32(exported):
    full, half = (onnx.load(exported[0] / "onnx" / name) for name in ("model.onnx", "model_fp16.onnx"))
    for graph in (full.graph, half.graph):
        kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
        assert kinds == {onnx.TensorProto.FLOAT}
    assert any(weight.data_type == onnx.TensorProto.FLOAT16 for weight in half.graph.initializer)
    sizes = [sum(len(weight.raw_data) for weight in model.graph.initializer) for model in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--opset", "11"], "--opset must be 18 or more"),
        (["--image_size", "big"], "--image_size must be a number or HEIGHTxWIDTH, up to 16384 pixels, got 'big'"),
        (["--batch_size", "0"], "--batch_size must be 1 or more, got 0"),
        (["--num_images", "0"], "--num_images must be 1 or more, got 0"),
        (["--threads", "-1"], "--threads must be 1 or more, got -1"),
        (["--runs", "1"], "--runs must be 2 or more, or 0 for no latency, got 1"),
        (["--output_dir", "model"], "--output_dir must not be the model's folder"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        export.main(["--model_name_or_path", "model", "--output_dir", "onnx", *arguments])


def test_help_explains_every_argument(monkeypatch, capsys):
    with pytest.raises(SystemExit) as done:
        export.main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    for name in ("model_name_or_path", "output_dir", "image_size", "opset", "fp16", "input", "runs", "threads"):
        assert f"--{name}" in text


def test_generated_images_stand_in_where_none_are_given(monkeypatch):
    images = export.load_images(None, 3, (48, 80))
    assert list(images) == [f"shapes/validation/{i}" for i in range(3)]
    assert {image.size for image in images.values()} == {(80, 48)}
