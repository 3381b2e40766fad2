"""COCO figures of files: the official ones, and what is wrong with a bad file."""

from __future__ import annotations

import json

import pytest

from hf_detrkd.evaluation import FIGURES
from hf_detrkd.evaluation.coco_results import evaluate_coco_files
from tests.evaluation.boxes import ANNOTATIONS, DETECTIONS, OFFICIAL, needs_coco_eval


@needs_coco_eval
def test_the_official_figures():
    figures = evaluate_coco_files(ANNOTATIONS, DETECTIONS)
    assert [figures[name] for name in FIGURES] == pytest.approx(OFFICIAL, abs=1e-12)
    assert figures["map_person"] > 0


def coco(**changes):
    return {
        "images": [{"id": 1}, {"id": 2}],
        "annotations": [{"image_id": 1, "category_id": 3, "bbox": [0, 0, 50, 50]}],
        "categories": [{"id": 3, "name": "cat"}],
        **changes,
    }


def detection(**changes):
    return {"image_id": 1, "category_id": 3, "bbox": [0, 0, 50, 50], "score": 0.5, **changes}


@pytest.fixture
def files(tmp_path):
    def write(truth, answers):
        paths = tmp_path / "truth.json", tmp_path / "answers.json"
        for path, content in zip(paths, (truth, answers), strict=True):
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return paths

    return write


def test_files_need_neither_area_nor_crowd(files):
    assert evaluate_coco_files(*files(coco(), [detection()]))["map_cat"] == pytest.approx(1.0)
    assert evaluate_coco_files(*files(coco(), []))["map"] == 0
    none = coco(annotations=[detection(area=None, iscrowd=None)])
    assert evaluate_coco_files(*files(none, [detection()]))["map_cat"] == pytest.approx(1.0)


FAR = [{"image_id": 1, "category_id": 9, "bbox": [0, 0, 5, 5]}]


@pytest.mark.parametrize(
    "truth, answers, message",
    [
        ("{", [], r"truth.json is not JSON \(Expecting"),
        (coco(), "\x00", r"answers.json is not JSON"),
        ([], [], r"truth.json is not COCO: .* lists images, annotations, categories, .* list"),
        ({"images": [], "info": {}}, [], r"\['images', 'info'\]"),
        (coco(images=[{"file_name": "a.jpg"}]), [], r"truth.json is not COCO: `images` .* entry 0 has no `id`"),
        (coco(categories=[{"id": 3}]), [], r"`categories` .* entry 0 has no `name` of type str"),
        (coco(annotations=FAR), [], r"truth.json must hold category ids of the ground truth, got 9"),
        (coco(), {"a": 1}, r"answers.json must be a list of COCO detections, got a dict"),
        (coco(), [detection(bbox=[1, 2, 3])], r"answers.json must hold boxes with .*'bbox': \[1, 2, 3\]"),
        (coco(), [detection(bbox=[1, 2, -3, 4])], r"`bbox` as \[x, y, width, height\] in pixels, got"),
        (coco(), [detection(bbox=[0, 0, float("nan"), 1])], r"`bbox` as \[x, y, width, height\] in pixels, got"),
        (coco(), [{"image_id": 1, "category_id": 3, "segmentation": []}], r"answers.json must hold boxes with"),
        (coco(), [detection(bbox=["1", 2, 3, 4])], r"`bbox` as \[x, y, width, height\] in pixels, got"),
        (coco(), [detection(bbox=[True, 2, 3, 4])], r"`bbox` as \[x, y, width, height\] in pixels, got"),
        (coco(), [detection(bbox=[10**400, 2, 3, 4])], r"`bbox` as \[x, y, width, height\] in pixels, got"),
        (
            coco(annotations=[detection(area="5")]),
            [],
            r"truth.json must hold annotations with a finite `area` or none",
        ),
        (
            coco(annotations=[detection(iscrowd=2)]),
            [],
            r"truth.json must hold annotations with an `iscrowd` of 0 or 1",
        ),
        (coco(categories=[{"id": 2**63, "name": "cat"}]), [], r"category ids of 64 bits, got 9223372036854775808"),
        (coco(), [detection(score=None)], r"answers.json must hold detections with a finite `score`, got"),
        (coco(), [detection(image_id=i) for i in range(50)], r"image ids .*, got 0, 3, 4, 5, 6, 7, 8, 9, 10, 11$"),
        (coco(), [detection(category_id=0)], r"answers.json must hold category ids of the ground truth, got 0"),
    ],
)
def test_bad_files_are_named_with_what_is_wrong(files, truth, answers, message):
    with pytest.raises(ValueError, match=message):
        evaluate_coco_files(*files(truth, answers))
