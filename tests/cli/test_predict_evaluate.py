"""`predict.py` and `evaluate_detector.py`: what a model finds is, taken as the truth, what it then scores by."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import RTDetrImageProcessor

from hf_detrkd.cli import evaluate, predict
from tests import tiny
from tests.processes import finish, start
from tests.together import run_together


SIZE = 64


def save_model(folder, family="rt_detr"):
    tiny.build(family).save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    RTDetrImageProcessor(size=size).save_pretrained(folder)  # no normalisation, no padding
    return folder


def save_images(folder, count):
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A model, five images of which one cannot be read, and what `predict.py` made of them."""
    folder = tmp_path_factory.mktemp("found")
    save_model(folder / "model")
    save_images(folder / "data" / "val", 5)
    (folder / "data" / "val" / "broken.jpg").write_text("no image")
    (folder / "data" / "val" / "notes.txt").write_text("not looked at")
    arguments = ["--model_name_or_path", folder / "model", "--input", folder / "data" / "val"]
    arguments += ["--output_dir", folder / "out", "--threshold", "0.7", "--batch_size", "2", "--device", "cpu"]
    log = folder / "log.txt"
    return folder, finish(start(predict.main, (list(map(str, arguments)),), log), log)


def test_predict_writes_pictures_and_a_coco_file(found):
    folder, printed = found
    content = json.loads((folder / "out" / "predictions.json").read_text())
    assert {file.name for file in (folder / "out").glob("*.png")} == {f"{i}.png" for i in range(5)}
    assert [image["file_name"] for image in content["images"]] == [f"{i}.png" for i in range(5)]
    assert all((image["width"], image["height"]) == (SIZE, SIZE) for image in content["images"])
    assert len(content["annotations"]) >= 5 and f"Found {len(content['annotations'])} objects in 5 images" in printed
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert list(names.values()) == list(tiny.LABELS)
    for annotation in content["annotations"]:
        assert annotation["label"] == names[annotation["category_id"]] and 0.7 <= annotation["score"] <= 1


def test_predict_names_what_it_cannot_read_and_goes_on(found):
    folder, printed = found
    assert f"Skipped {folder / 'data' / 'val' / 'broken.jpg'}: cannot identify image file" in printed
    assert "notes.txt" not in printed


def test_predict_finds_the_detections_of_the_processor(found):
    folder, _ = found
    content = json.loads((folder / "out" / "predictions.json").read_text())
    model, image = tiny.build("rt_detr"), Image.open(folder / "data" / "val" / "3.png")
    processor = RTDetrImageProcessor(size={"height": SIZE, "width": SIZE})
    with torch.no_grad():
        outputs = model(**processor(images=[image], return_tensors="pt"))
    (expected,) = processor.post_process_object_detection(outputs, threshold=0.7, target_sizes=[(SIZE, SIZE)])
    ours = [x for x in content["annotations"] if x["image_id"] == 4]
    count = len(expected["scores"])  # no more than the model has queries
    assert count > 0
    assert [x["score"] for x in ours[:count]] == pytest.approx(expected["scores"].tolist(), abs=1e-3)
    corners = [[x, y, x + width, y + height] for x, y, width, height in (entry["bbox"] for entry in ours[:count])]
    assert torch.allclose(torch.tensor(corners), expected["boxes"], atol=0.1)


def test_predict_takes_a_single_image_and_makes_its_folder(found, tmp_path, capsys):
    image = found[0] / "data" / "val" / "0.png"
    arguments = ["--model_name_or_path", str(found[0] / "model"), "--input", str(image)]
    predict.main([*arguments, "--output_dir", str(tmp_path / "a" / "b"), "--threshold", "0.99"])
    assert sorted(file.name for file in (tmp_path / "a" / "b").iterdir()) == ["0.png", "predictions.json"]
    assert "objects in 1 images" in capsys.readouterr().out


def test_predict_searches_folders_and_says_what_the_best_score_was_where_it_finds_nothing(found, tmp_path, capsys):
    folder, _ = found
    save_images(tmp_path / "photos" / "first", 1)
    save_images(tmp_path / "photos" / "second", 1)
    arguments = ["--model_name_or_path", folder / "model", "--input", tmp_path / "photos", "--threshold", "1"]
    arguments += ["--output_dir", tmp_path / "photos" / "out", "--device", "cpu"]
    for _ in range(2):  # the second time its own drawings are there, too
        predict.main(list(map(str, arguments)))
        printed = capsys.readouterr().out
        content = json.loads((tmp_path / "photos" / "out" / "predictions.json").read_text())
        assert [image["file_name"] for image in content["images"]] == ["first/0.png", "second/0.png"]
        assert "Found 0 objects in 2 images" in printed and "No score reaches --threshold 1: the best is 0." in printed
    assert (tmp_path / "photos" / "out" / "second" / "0.png").is_file()


def test_predict_reads_softmax_heads(tmp_path):
    arguments = [
        "--model_name_or_path",
        str(save_model(tmp_path / "model", "detr")),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    predict.main([*arguments, "--input", str(save_images(tmp_path / "images", 1)), "--threshold", "0"])
    content = json.loads((tmp_path / "o" / "predictions.json").read_text())
    assert len(content["annotations"]) == tiny.NUM_QUERIES


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input": "{tmp}/none"}, "must be an image or a folder of images, but .*none does not exist"),
        ({"input": "{tmp}"}, r"must hold images \(.bmp, .*, but .* holds none"),
        ({"input": "{broken}"}, "must hold images that can be read, but none of the 1 can"),
        ({"threshold": "2"}, r"--threshold must lie in \[0, 1\], got 2.0"),
        ({"batch_size": "0"}, "--batch_size must be 1 or more, got 0"),
        ({"output_dir": "{images}"}, "--output_dir must not be the folder of the images"),
    ],
)
def test_predict_refuses(found, tmp_path, changes, message):
    images = found[0] / "data" / "val"
    places = {"tmp": tmp_path, "images": images, "broken": images / "broken.jpg"}
    arguments = {"model_name_or_path": found[0] / "model", "input": images, "output_dir": tmp_path / "o"}
    arguments |= {name: value.format(**places) for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        predict.main([part for name, value in arguments.items() for part in (f"--{name}", str(value))])


@pytest.fixture(scope="module")
def data(found):
    """The detections as the truth of a COCO folder, with other category ids, in another order, and one class fewer."""
    folder = found[0]
    content = json.loads((folder / "out" / "predictions.json").read_text())
    counts = [sum(x["category_id"] == i for x in content["annotations"]) for i in range(tiny.NUM_CLASSES)]
    left_out = counts.index(min(counts))
    ids = {i: 10 * ((i + 2) % tiny.NUM_CLASSES) + 1 for i in range(tiny.NUM_CLASSES) if i != left_out}
    content["categories"] = [{"id": ids[i], "name": tiny.LABELS[i]} for i in ids]
    kept = [x for x in content["annotations"] if x["category_id"] in ids]
    content["annotations"] = [{**x, "category_id": ids[x["category_id"]]} for x in kept]
    (folder / "data" / "annotations").mkdir()
    (folder / "data" / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return folder


def evaluate_arguments(folder, file):
    arguments = ["--model_name_or_path", folder / "model", "--dataset_name", folder / "data", "--output_file", file]
    return [str(x) for x in [*arguments, "--per_device_eval_batch_size", 2, "--use_cpu"]]


def test_evaluate_finds_again_what_predict_found(data, tmp_path, capsys):
    evaluate.main(evaluate_arguments(data, tmp_path / "new" / "figures.json"))
    figures = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert figures["map_50"] > 0.9
    truth = json.loads((data / "data" / "annotations" / "instances_val.json").read_text())
    classes = [category["name"] for category in sorted(truth["categories"], key=lambda category: category["id"])]
    assert [name for name in figures if name not in evaluate.FIGURES] == [f"map_{name}" for name in classes]
    seen = {annotation["label"] for annotation in truth["annotations"]}
    assert any(classes.index(name) != tiny.LABELS.index(name) for name in seen)  # or numbers would do for names
    shown = capsys.readouterr().out
    assert f"{100 * figures['map']:.1f}" in shown and all(name in shown for name in classes)


@pytest.mark.distributed
def test_evaluate_gives_the_same_in_two_processes(data, tmp_path):
    evaluate.main(evaluate_arguments(data, tmp_path / "one.json"))
    printed = run_together(evaluate.main, evaluate_arguments(data, tmp_path / "two.json"))
    assert "Evaluated on 2 processes." in printed[0]
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two == pytest.approx(one, abs=1e-6)


def test_the_detections_that_evaluate_writes_have_the_same_figures(data, tmp_path):
    evaluate.main(
        [*evaluate_arguments(data, tmp_path / "a.json"), "--output_detections", str(tmp_path / "new/d.json")]
    )
    truth = data / "data" / "annotations" / "instances_val.json"
    files = ["--annotations", str(truth), "--detections", str(tmp_path / "new" / "d.json")]
    evaluate.main([*files, "--output_file", str(tmp_path / "b.json")])
    figures = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    assert figures[1] == pytest.approx(figures[0], abs=2e-3)


def test_evaluate_refuses_a_model_of_other_classes(data, tmp_path):
    arguments = evaluate_arguments(data, tmp_path / "figures.json")
    with pytest.raises(ValueError, match=r"lacks \['disc', .*; its own are \['circle', 'cross', 'square'"):
        evaluate.main([*arguments, "--dataset_name", "shapes", "--max_eval_samples", "2"])


def test_evaluate_judges_a_results_file_without_a_model(tmp_path, capsys):
    box = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 50, 50]}
    names = [{"id": i, "name": f"class {i}"} for i in range(40)]
    truth = {"images": [{"id": 1}], "annotations": [box], "categories": names}
    (tmp_path / "a.json").write_text(json.dumps(truth))
    (tmp_path / "d.json").write_text(json.dumps([{**box, "score": 1}]))
    files = ["--annotations", str(tmp_path / "a.json"), "--detections", str(tmp_path / "d.json")]
    evaluate.main([*files, "--output_file", str(tmp_path / "f.json")])
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["map"] == figures["map_class 7"] == pytest.approx(1) and figures["map_large"] == -1
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split() == ["mAP", "100.0", "100.0", "100.0", "-", "100.0", "-"]
    assert shown[-1] == "The mAP of each of the 40 classes is in --output_file."


def test_evaluate_judges_the_file_that_predict_writes(tmp_path):
    categories = [{"id": 5, "name": "cat"}, {"id": 9, "name": "dog"}]
    images = [{"id": 40, "file_name": "a.png"}, {"id": 30, "file_name": "sub/b.png"}]
    truth = [{"image_id": 30, "category_id": 9, "bbox": [0, 0, 50, 50]}]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": truth, "categories": categories}))
    found = {
        "images": [{"id": 1, "file_name": "sub/b.png"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 0, "bbox": [0, 0, 50, 50], "score": 0.9}],
        "categories": [{"id": 0, "name": "dog"}, {"id": 1, "name": "horse"}],
    }
    files = ["--annotations", str(tmp_path / "a.json"), "--detections", str(tmp_path / "d.json")]
    (tmp_path / "d.json").write_text(json.dumps(found))
    evaluate.main([*files, "--output_file", str(tmp_path / "f.json")])
    assert json.loads((tmp_path / "f.json").read_text())["map_dog"] == pytest.approx(1)
    for change, message in (
        ({"images": [{"id": 1, "file_name": "c.png"}]}, "must hold file names of the ground truth, got 'c.png'"),
        ({"categories": [{"id": 0, "name": "cow"}]}, "must hold category names of the ground truth, got 'cow'"),
        ({"categories": categories}, "must hold annotations of its own categories, got 0"),
    ):
        (tmp_path / "d.json").write_text(json.dumps(found | change))
        with pytest.raises(ValueError, match=message):
            evaluate.main(files)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Give either --model_name_or_path, or both --annotations and --detections, got None, None and None"),
        (["--annotations", "a.json"], "Give either .* got None, 'a.json' and None"),
        (["--annotations", "a", "--detections", "d", "--model_name_or_path", "m"], "got 'm', 'a' and 'd'"),
        (["--model_name_or_path", "m"], "Say which data set: --dataset_name path/to/folder"),
        (
            ["--model_name_or_path", "m", "--dataset_name", "d", "--per_device_eval_batch_size", "0"],
            "must be 1 or more, got 0",
        ),
    ],
)
def test_evaluate_refuses_arguments_that_do_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate.main(arguments)


@pytest.mark.parametrize("size", ["0", "-5", "big", "1x2x3", "x"])
def test_evaluate_refuses_other_image_sizes(size):
    with pytest.raises(
        ValueError, match=f"--image_size must be a number or HEIGHTxWIDTH, up to 16384 pixels, got {size!r}"
    ):
        evaluate.EvaluateArguments("model", image_size=size)
