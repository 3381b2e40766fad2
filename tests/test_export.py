"""An exported file answers as its detector does, for any number of images; one that does not never gets its name."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    DetrImageProcessor,
    RTDetrImageProcessor,
)

from hf_detrkd import export
from hf_detrkd.data import load_detection_split
from hf_detrkd.data.shapes import SHAPE_CLASSES
from hf_detrkd.export import export_checked, fixed_size_processor, pixels_of
from hf_detrkd.onnx_graph import OnnxExport, export_onnx, opset_of
from hf_detrkd.onnx_parity import (
    FLOAT16,
    FLOAT32,
    Deviation,
    OnnxExportError,
    OnnxParityError,
    Parity,
    check_parity,
    compare,
    in_batches,
    onnx_heads,
    time_in_turns,
)
from hf_detrkd.outputs import Predictions
from tests import tiny


SCRIPTS = Path(__file__).parents[1] / "scripts"
TEACHER = SCRIPTS / "recipes" / "quickstart" / "teacher"
SIZE = 128  # with less, Deformable DETR's fourth level is one pixel, which GroupNorm refuses
QUICK = {  # small graphs; RT-DETR goes through the script
    "detr": {"encoder_layers": 1, "decoder_layers": 1},
    "faster_rcnn": {
        "options": {"box_detections_per_img": 20, "rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 60}
    },
}
SLOW = tuple(name for name in tiny.DETECTORS if name not in QUICK)


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


# --- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Four drawn images, and what `export.py` made of the quickstart's teacher, which knows what is on them."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "images").mkdir()
    for i, record in enumerate(load_detection_split("shapes", max_samples=4, shapes_size=(90, 120)).records):
        record.load().save(folder / "images" / f"{i}.png")
    arguments = ["--model_name_or_path", TEACHER, "--output_dir", folder / "onnx", "--fp16", "--threads", "1"]
    arguments += ["--input", folder / "images", "--runs", "2", "--batch_size", "2"]
    paths = os.pathsep.join([str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, [SCRIPTS / "export.py", *arguments])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


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
    assert "model.onnx: " in done.stdout and "on 4 images in batches of 1 and 3" in done.stdout


def test_sixteen_bits_halve_the_file_and_keep_images_and_answers_in_float32(exported):
    full, half = (onnx.load(exported[0] / "onnx" / name) for name in ("model.onnx", "model_fp16.onnx"))
    for graph in (full.graph, half.graph):
        kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
        assert kinds == {onnx.TensorProto.FLOAT}
    assert any(weight.data_type == onnx.TensorProto.FLOAT16 for weight in half.graph.initializer)
    sizes = [sum(len(weight.raw_data) for weight in model.graph.initializer) for model in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]


def load_script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))  # it takes find_images from predict.py
    specification = importlib.util.spec_from_file_location("scripts_export", SCRIPTS / "export.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, specification.name, module)  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--opset", "11"], "--opset must be 18 or more"),
        (["--image_size", "big"], "--image_size must be a number or HEIGHTxWIDTH, got 'big'"),
        (["--batch_size", "0"], "--batch_size must be 1 or more, got 0"),
        (["--num_images", "0"], "--num_images must be 1 or more, got 0"),
        (["--threads", "-1"], "--threads must be 1 or more, got -1"),
        (["--runs", "1"], "--runs must be 2 or more, or 0 for no latency, got 1"),
        (["--output_dir", "model"], "--output_dir must not be the model's folder"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_is_loaded(monkeypatch, arguments, message):
    script = load_script(monkeypatch)
    with pytest.raises(ValueError, match=message):
        script.main(["--model_name_or_path", "model", "--output_dir", "onnx", *arguments])


def test_help_explains_every_argument(monkeypatch, capsys):
    with pytest.raises(SystemExit) as done:
        load_script(monkeypatch).main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    for name in ("model_name_or_path", "output_dir", "image_size", "opset", "fp16", "input", "runs", "threads"):
        assert f"--{name}" in text


def test_generated_images_stand_in_where_none_are_given(monkeypatch):
    images = load_script(monkeypatch).load_images(None, 3, (48, 80))
    assert list(images) == [f"shapes/validation/{i}" for i in range(3)]
    assert {image.size for image in images.values()} == {(80, 48)}


# --- families --------------------------------------------------------------------------------------------------------


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
    with pytest.raises(OnnxParityError, match=r"within 0\.0001 of scores and 0\.001 .* but image \d in a batch of"):
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
    with pytest.raises(
        OnnxExportError, match=r"onnxruntime must load the file, but says: .* kept as .*model\.failed\.onnx"
    ):
        export_checked(tiny.build("yolos"), tmp_path, pixels())


def test_what_has_no_onnx_operator_is_named(tmp_path, monkeypatch):
    model = tiny.build("yolos", num_hidden_layers=2)
    linear = model.class_labels_classifier.forward
    monkeypatch.setattr(
        model.class_labels_classifier,
        "forward",
        lambda states: linear(states + torch.linalg.svdvals(states)[:, :, None].sum(1, keepdim=True)),
    )
    with pytest.raises(OnnxExportError, match=r"A yolos must become an ONNX graph, but .* fails: .*svd"):
        export_onnx(model, tmp_path / "model.onnx", (SIZE, SIZE))


def test_a_model_that_trains_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match=r"in training mode: call model\.float\(\)\.cpu\(\)\.eval\(\)"):
        export_onnx(tiny.build("yolos").train(), tmp_path / "model.onnx", (SIZE, SIZE))
    with pytest.raises(ValueError, match=r"got torch\.float16 on cpu"):
        export_onnx(tiny.build("yolos").half(), tmp_path / "model.onnx", (SIZE, SIZE))


# --- the image processor ---------------------------------------------------------------------------------------------


def test_a_processor_that_pads_needs_a_size():
    with pytest.raises(ValueError, match=r"keeps their aspect ratio and pads .* give --image_size HEIGHTxWIDTH"):
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


# --- the comparison --------------------------------------------------------------------------------------------------


def answers(rows=7, images=2, activation="sigmoid"):
    columns = 6 if activation == "softmax" else 5
    return Predictions(torch.randn(images, rows, columns), tiny.random_boxes(images, rows), activation=activation)


def moved(predictions, logits=0.0, boxes=0.0, order=None):
    order = torch.arange(predictions.boxes.shape[1]) if order is None else order
    return Predictions(
        predictions.logits[:, order] + logits, predictions.boxes[:, order] + boxes, activation=predictions.activation
    )


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_rows_in_another_order_are_the_same_detections(activation):
    ours = answers(activation=activation)
    for deviation in compare(ours, moved(ours, order=torch.randperm(7)), ["a", "b"], FLOAT32):
        assert deviation.excess(FLOAT32) < 0.01 and not deviation.rows_agree and deviation.unpaired == 0
        assert deviation.compared == (7 if activation == "softmax" else 35)


def test_a_shift_is_measured_with_rows_in_any_order():
    ours = answers()
    shift = torch.tensor([5e-4, 0, 0, 0])
    same = compare(ours, moved(ours, boxes=shift), ["a", "b"], FLOAT32)
    assert all(x.rows_agree and x.boxes == pytest.approx(5e-4, rel=1e-2) for x in same)
    swapped = compare(ours, moved(ours, boxes=shift, order=torch.arange(7).flip(0)), ["a", "b"], FLOAT32)
    assert all(not x.rows_agree and x.boxes == pytest.approx(5e-4, rel=1e-2) for x in swapped)
    far = compare(ours, moved(ours, boxes=4 * shift), ["a", "b"], FLOAT32)
    assert all(x.excess(FLOAT32) == pytest.approx(2, rel=1e-2) for x in far)


def test_only_the_image_that_deviates_is_blamed():
    ours = answers()
    theirs = moved(ours)
    theirs.boxes[1, 3, 0] += 0.1
    parity = Parity(compare(ours, theirs, ["good", "bad"], FLOAT32), FLOAT32)
    assert parity.deviations[0].rows_agree and parity.worst.image == "bad"
    with pytest.raises(OnnxParityError, match=r"bad in a batch of 2 has 0 and 0\.1"):
        parity.raise_if_beyond()


def test_a_detection_of_another_class_has_no_counterpart():
    ours = Predictions(torch.tensor([[[9.0, -9.0, -9.0]]]), tiny.random_boxes(1, 1), activation="softmax")
    theirs = Predictions(torch.tensor([[[-9.0, 9.0, -9.0]]]), ours.boxes, activation="softmax")
    (deviation,) = compare(ours, theirs, ["a"], FLOAT16)
    assert deviation.unpaired == 1 and deviation.excess(FLOAT16) == float("inf")
    with pytest.raises(OnnxParityError, match="1 detections without counterpart"):
        Parity([deviation], FLOAT16).raise_if_beyond()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["logits", "boxes"])
def test_what_is_no_number_is_infinitely_far(value, part):
    ours = answers()
    theirs = moved(ours)
    getattr(theirs, part)[0, 0] = value
    assert compare(ours, theirs, ["a", "b"], FLOAT16)[0].excess(FLOAT16) > 1


def test_weak_detections_do_not_count_in_sixteen_bits_and_sure_ones_do():
    logits = torch.tensor([[[4.0], [-4.0]]])
    ours = Predictions(logits, torch.full((1, 2, 4), 0.5), activation="sigmoid")
    weak, sure = moved(ours), moved(ours)
    weak.boxes[0, 1] += 0.2
    sure.boxes[0, 0] += 0.2
    assert compare(ours, weak, ["a"], FLOAT16)[0].excess(FLOAT16) == 0
    assert compare(ours, weak, ["a"], FLOAT32)[0].excess(FLOAT32) > 1
    assert compare(ours, sure, ["a"], FLOAT16)[0].excess(FLOAT16) > 1


def test_a_check_of_nothing_is_none():
    ours = Predictions(torch.full((1, 2, 1), -4.0), torch.full((1, 2, 4), 0.5), activation="sigmoid")
    (deviation,) = compare(ours, moved(ours, boxes=0.2), ["a"], FLOAT16)
    assert deviation.compared == 0
    with pytest.raises(OnnxParityError, match=r"needs images on which the detector is sure of something"):
        Parity([deviation], FLOAT16).raise_if_beyond()


def test_the_hundredth_detection_may_change_with_the_next_one_as_good():
    scores = torch.linspace(4, 1, 120)[:, None].repeat(1, 1)
    scores[99], scores[100] = 1.5, 1.5 - 1e-6
    scores[101:] = -4
    ours = Predictions(scores[None], tiny.random_boxes(1, 120), activation="sigmoid")
    theirs = moved(ours)
    theirs.logits[0, 99] -= 2e-6
    theirs.boxes[0, 110] += 0.5  # so that rows do not agree
    (deviation,) = compare(ours, theirs, ["a"], FLOAT32)
    assert deviation.compared == 99 and deviation.excess(FLOAT32) < 1
    theirs.boxes[0, 50] += 0.5
    assert compare(ours, theirs, ["a"], FLOAT32)[0].excess(FLOAT32) > 1


def test_other_shapes_are_no_answer():
    with pytest.raises(OnnxParityError, match=r"must have the shapes .* but onnxruntime has"):
        compare(answers(7), answers(6), ["a", "b"], FLOAT32)


def test_batches_are_always_full_and_hold_every_image():
    assert list(in_batches(["a", "b", "c", "d"], 3)) == [["a", "b", "c"], ["d", "a", "b"]]
    assert list(in_batches(["a"], 3)) == [["a", "a", "a"]]
    assert list(in_batches(["a", "b"], 1)) == [["a"], ["b"]]


def test_the_worst_deviation_is_measured_in_tolerances():
    small = Deviation("scores", 1, scores=9e-5, boxes=0.0, rows_agree=True, compared=1)
    large = Deviation("boxes", 1, scores=0.0, boxes=5e-4, rows_agree=True, compared=1)
    assert Parity([large, small], FLOAT32).worst is small
    Parity([large, small], FLOAT32).raise_if_beyond()


def test_latency_is_that_of_the_batch_and_of_each_side_alone():
    seen = []

    def side(name):
        def answer(batch):
            seen.append((name, tuple(batch.shape)))
            return batch, batch

        return answer

    figures = time_in_turns({"a": side("a"), "b": side("b")}, (4, 6), 3, runs=5)
    assert set(figures) == {"a", "b"} and seen[:2] == [("a", (3, 3, 4, 6)), ("b", (3, 3, 4, 6))]
    assert len(seen) == 2 * (5 + 2)  # two passes of each warm up
    assert all(x["low_ms"] <= x["median_ms"] <= x["high_ms"] for x in figures.values())
