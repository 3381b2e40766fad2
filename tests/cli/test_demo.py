"""The demo: what its page shows of two detectors, and the folder that is a Space."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gradio_client import Client, handle_file
from PIL import Image

from hf_detrkd.cli.demo import comparison
from hf_detrkd.cli.demo import main as demo
from hf_detrkd.cli.demo.comparison import LoadedDetector, Result
from hf_detrkd.cli.predict import detect
from hf_detrkd.data.images import read_image
from hf_detrkd.data.shapes import SHAPE_CLASSES
from hf_detrkd.distillation.student import load_image_processor
from tests import ROOT, tiny


NAMES = {"id2label": dict(enumerate(SHAPE_CLASSES)), "label2id": {name: i for i, name in enumerate(SHAPE_CLASSES)}}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where gradio keeps its copies of images."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))


@pytest.fixture
def shapes_student(tmp_path: Path) -> str:
    """Folder of a random student of generated shapes."""
    tiny.build("rt_detr", 32, seed=1, **NAMES).save_pretrained(tmp_path / "student")
    processor = load_image_processor(tiny.build("rt_detr", 32), image_size=(64, 64))
    processor.save_pretrained(tmp_path / "student")
    return str(tmp_path / "student")


@pytest.fixture
def arguments(shapes_student: str, shapes_teacher: str) -> list[str]:
    models = ["--model_name_or_path", shapes_student, "--teacher_model_name_or_path", shapes_teacher]
    return [*models, "--input", "shapes", "--device", "cpu"]


@pytest.fixture
def detectors(shapes_student: str, shapes_teacher: str) -> list[LoadedDetector]:
    return demo.load_detectors(demo.DemoArguments(shapes_student, shapes_teacher, device="cpu"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    pixels = torch.randint(0, 256, (90, 120, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pages that would be started, with the arguments of their server."""
    import gradio as gr

    seen: list[Any] = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **server: seen.append((page, server)))
    return seen


def result(boxes: list[list[float]], scores: list[float]) -> Result:
    found = {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor([1, 0, 1])}
    return Result("Student", 1_234_567, ["cat", "dog"], found, 12.34, "a CPU")


TWO_SURE = result([[100, 200, 900, 1000], [0, 0, 10, 10], [20, 20, 40, 40]], [0.9, 0.3, 0.6])


def test_the_detections_of_both_are_those_of_predict(detectors: list[LoadedDetector], file: Path) -> None:
    image = read_image(file, "image")
    results = comparison.compare(detectors, image)
    assert [one.title for one in results] == ["Teacher", "Student"]
    for detector, one in zip(detectors, results, strict=True):
        (expected,) = detect(detector.model, detector.processor, [image])
        assert all(torch.equal(one.found[name], expected[name]) for name in ("boxes", "labels", "scores"))
        assert one.parameters == detector.model.num_parameters() and one.milliseconds > 0
    assert not torch.equal(results[0].found["boxes"], results[1].found["boxes"])


def test_figures_and_boxes_count_what_reaches_the_threshold() -> None:
    table = comparison.figures([TWO_SURE], 0.6).splitlines()
    assert "| Parameters | 1.23 M |" in table and "| Latency | 12.3 ms |" in table and "| Objects | 2 |" in table
    rows = [
        ["Student", "dog", "0.90", "100", "200", "900", "1000"],
        ["Student", "dog", "0.60", "20", "20", "40", "40"],
    ]
    assert comparison.boxes([TWO_SURE], 0.6) == rows


def test_a_large_image_is_drawn_small_with_its_boxes_in_place() -> None:
    image, colors = Image.new("RGB", (1600, 1200)), {"dog": "#ff0000", "cat": "#00ff00"}
    small = comparison.picture(TWO_SURE, image, 0.7, colors)
    assert small.size == (800, 600)
    red = (torch.from_numpy(np.array(small))[..., 0] > 200).nonzero()
    assert red[:, 1].min() == pytest.approx(50, abs=1) and red[:, 1].max() == pytest.approx(450, abs=1)
    assert red[:, 0].max() == pytest.approx(500, abs=1)


def test_the_page_answers_with_pictures_figures_and_boxes(detectors: list[LoadedDetector], tmp_path: Path) -> None:
    from hf_detrkd.cli.demo.page import build_page

    file = tmp_path / "scan.png"  # 16 bits, which gradio itself would read as white
    Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (90, 120)).astype(np.uint16)).save(file)
    page = build_page(detectors, [file])
    address = page.launch(prevent_thread_lock=True, quiet=True)[1]
    try:
        client = Client(address, download_files=tmp_path, verbose=False, analytics_enabled=False)
        teacher, student, table, boxes = client.predict(handle_file(file), 0.0, api_name="/detect")
    finally:
        page.close()
    assert Image.open(teacher).size == Image.open(student).size == (320, 240)
    assert re.search(r"\| Objects \| \d+ \| \d+ \|", table)
    assert boxes["data"] == comparison.boxes(comparison.compare(detectors, read_image(file, "scan")), 0.0)


def test_the_page_is_served_where_it_is_told(arguments: list[str], launched: list[Any]) -> None:
    demo.main([*arguments, "--host", "0.0.0.0", "--port", "7999"])
    ((page, server),) = launched
    assert server == {"server_name": "0.0.0.0", "server_port": 7999, "share": False}
    assert not page.analytics_enabled


def test_the_slider_draws_again_without_a_pass_of_the_models(
    arguments: list[str], launched: list[Any], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.main(arguments)
    run, show = (function.fn for function in launched[0][0].fns.values() if function.fn.__name__ in ("run", "show"))
    results, *everything = run(str(file), 0.0)
    monkeypatch.setattr("hf_detrkd.cli.demo.page.compare", None)
    fewer = show(results, str(file), 0.9)
    assert len(fewer[-1]) < len(everything[-1]) and show(results, str(file), 0.0)[-1] == everything[-1]
    assert show(None, None, 0.5) == [None, None, None, []]


def test_an_image_that_cannot_be_read_is_told_on_the_page(
    arguments: list[str], launched: list[Any], tmp_path: Path
) -> None:
    import gradio as gr

    demo.main(arguments)
    (run,) = (function.fn for function in launched[0][0].fns.values() if function.fn.__name__ == "run")
    (tmp_path / "broken.jpg").write_text("no image")
    with pytest.raises(gr.Error, match=r"The image broken\.jpg cannot be read"):
        run(str(tmp_path / "broken.jpg"), 0.5)


def test_without_gradio_the_extra_is_named_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "hf_detrkd.cli.demo.page", raising=False)
    with pytest.raises(ImportError, match=r"The demo needs gradio .*pip install 'hf-detrkd\[demo\]'"):
        demo.main(["--model_name_or_path", "no/such/model"])


def test_the_folder_of_a_space_runs_by_itself(
    arguments: list[str], launched: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = tmp_path / "space"
    demo.main([*arguments, "--space", str(space), "--threshold", "0.25"])
    assert not launched
    for folder in ("student", "teacher"):
        (tmp_path / folder).rename(tmp_path / f"away_{folder}")
    monkeypatch.chdir(space)
    runpy.run_path("app.py")
    ((page, _),) = launched
    images = [block for block in page.blocks.values() if block.get_block_name() == "image"]
    assert [image.label for image in images] == ["Image", "Teacher", "Student"]
    assert len(list((space / "examples").iterdir())) == demo.MOST_EXAMPLES
    texts = [file.read_text() for file in space.rglob("*") if file.suffix in (".md", ".py", ".txt", ".json")]
    assert not any(str(tmp_path) in text for text in texts)


def test_the_card_and_the_requirements_are_what_a_space_wants(
    arguments: list[str], tmp_path: Path, extras: dict[str, str]
) -> None:
    import gradio as gr

    demo.main([*arguments, "--space", str(tmp_path / "space")])
    settings = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---\n")[1])
    assert (settings["sdk"], settings["sdk_version"], settings["app_file"]) == ("gradio", gr.__version__, "app.py")
    assert settings["python_version"] >= "3.11" and "models" not in settings  # both are in the folder
    (line,) = re.findall(r"^hf-detrkd\[(\w+)\]", (tmp_path / "space" / "requirements.txt").read_text(), re.M)
    assert "gradio" in extras[line]


def test_a_space_names_the_detectors_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(title: str, name: str, revision: str, device: str | None) -> LoadedDetector:
        return LoadedDetector(title, name, revision, tiny.build("rt_detr"), None)

    monkeypatch.setattr(LoadedDetector, "load", load)
    models = ["--model_name_or_path", "a/student", "--teacher_model_name_or_path", "a/teacher"]
    demo.main([*models, "--teacher_model_revision", "v2", "--space", str(tmp_path / "space")])
    settings = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---\n")[1])
    assert settings["models"] == ["a/teacher", "a/student"]
    app = " ".join((tmp_path / "space" / "app.py").read_text().split())
    assert '"--teacher_model_name_or_path", "a/teacher", "--teacher_model_revision", "v2",' in app
    assert sorted(file.name for file in (tmp_path / "space").iterdir()) == ["README.md", "app.py", "requirements.txt"]


@pytest.mark.parametrize(
    "given, message",
    [
        (["--threshold", "2"], r"--threshold must lie in \[0, 1\], got 2.0"),
        (["--port", "0"], "--port must be a number from 1 to 65535, got 0"),
        (["--space", str(ROOT)], "--space must be a new or empty folder, but .* has content"),
        (["--input", "no/such/folder"], "--input must be an image or a folder of images"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.main(["--model_name_or_path", "no/such/model", *given])
