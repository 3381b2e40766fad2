"""Detections of any detector as answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_detrkd.answers import StoredAnswers
from hf_detrkd.answers.columns import LOWEST
from hf_detrkd.answers.detections import MOST, detection_rows, read_detections
from hf_detrkd.cli import answer, distill
from tests import tiny
from tests.answers.stored import dataset


def detections_of(data: Any, score: float = 0.8) -> list[dict[str, Any]]:
    """The ground truth as what a detector has found."""
    return [
        {
            "image_id": record.image_id,
            "category_id": data.category_ids[category],
            "bbox": box,
            "score": score,
        }
        for record in data.records
        for box, category in zip(record.boxes.tolist(), record.categories.tolist(), strict=True)
    ]


def test_rows_are_the_best_detections_as_boxes_and_scores(tmp_path: Path) -> None:
    data, file = dataset(), tmp_path / "found.json"
    found = detections_of(data, 0.8)
    found += [{**found[0], "score": 0.3, "bbox": [1, 2, 3, 4]}] * (MOST + 5)
    file.write_text(json.dumps(found[::-1]))
    rows = list(detection_rows(read_detections(file, data.category_ids), data, range(len(data))))
    assert [row["image_id"] for row in rows] == [record.image_id for record in data.records]
    for row, record in zip(rows, data.records, strict=True):
        scores = torch.tensor(row["layers/0/logits"]).sigmoid()
        count = len(record.boxes)
        assert torch.allclose(scores[:count].amax(-1), torch.tensor(0.8))
        classes = sorted(scores[:count].argmax(-1).tolist())
        assert classes == sorted(record.categories.tolist())
        full = record.image_id == found[0]["image_id"]
        assert (scores > 1e-4).sum() == (MOST if full else count)
        want = sorted(map(tuple, (record.boxes / 64).round(5).tolist()))
        boxes = row["layers/0/boxes"][:count]
        corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], 1)
        np.testing.assert_allclose(sorted(map(tuple, corners.round(5).tolist())), want, atol=1e-4)
    assert rows[1]["layers/0/logits"].min() == LOWEST


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"images": []}, "must be a JSON list of COCO results"),
        ([{"image_id": 1, "category_id": 0, "bbox": [0, 0, 1, 1]}], "Detection 0 in .* has no score"),
        ([{"image_id": 1, "category_id": 0, "bbox": [0, 0, 1, 1], "score": 7}], "the score 7, which must be a number"),
        ([{"image_id": 1, "category_id": 0, "bbox": [0, 0, 1, 1], "score": None}], "the score None, which must be"),
        ([{"image_id": "1", "category_id": 0, "bbox": [0, 0, 1, 1], "score": 0.5}], "the image_id '1', which must be"),
        ([{"image_id": 1, "category_id": 0, "bbox": [0, 0, 1], "score": 0.5}], "x, y, width and height in pixels"),
        ([{"image_id": 1, "category_id": 0, "bbox": [0, 0, -1, 1], "score": 0.5}], "x, y, width and height in pixels"),
        (
            [{"image_id": 1, "category_id": 99, "bbox": [0, 0, 1, 1], "score": 0.5}],
            "has the category 99, but those of",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    file = tmp_path / "found.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        read_detections(file, range(6))
    with pytest.raises(ValueError, match="must be a JSON list of COCO results"):
        read_detections(tmp_path / "nowhere.json", range(6))


@pytest.mark.parametrize("family", ["rt_detr", "deformable_detr/plain"])
def test_a_detector_without_a_model_teaches_by_specific_points(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "student.json").write_text(json.dumps(tiny.config(family).to_dict()))
    data = dataset(6)
    (tmp_path / "found.json").write_text(json.dumps(detections_of(data)[:-3]))
    text = f"--config_name {tmp_path}/student.json --method kd_detr --general_points 0 --image_size 64"
    text += " --dataset_name shapes --use_cpu"
    text += " --max_train_samples 6 --max_eval_samples 3 --max_steps 2 --per_device_train_batch_size 2"
    text += f" --disable_tqdm true --measure_efficiency false --report_to none --output_dir {tmp_path}/out"
    words = [*text.split(), "--logging_steps", "1", "--teacher_answers", str(tmp_path / "answers")]
    words += ["--answers_form", "moved"]
    answer.main([*words, "--detections", str(tmp_path / "found.json")])
    assert "6 rows (6 images, 1 views)" in capsys.readouterr().out
    answers = StoredAnswers(tmp_path / "answers")
    assert answers.moved and answers.manifest.teacher["name"] == "found.json"
    distill.main(words)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert all(
        entry["kd_detr_class_specific"] > 0 for entry in state["log_history"] if "kd_detr_class_specific" in entry
    )
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["teacher"]["name"] == "found.json"


def test_where_nothing_was_detected_nothing_is_compared(tmp_path: Path) -> None:
    data = dataset(2)
    (tmp_path / "found.json").write_text(json.dumps(detections_of(data)))
    (row, *_) = detection_rows(read_detections(tmp_path / "found.json", data.category_ids), data, range(2))
    counted = torch.tensor(row["layers/0/logits"]).sigmoid().amax(-1)
    shares = counted / counted.sum()
    assert shares[counted < 0.5].sum() < 1e-6
