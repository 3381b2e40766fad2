"""Small runs to look at: generated images as a folder, with what is wrong with them, and the quickstart's teacher."""

from __future__ import annotations

import functools
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_detrkd.cli import arguments as distill_arguments
from hf_detrkd.cli.doctor import check_data as doctor_data
from hf_detrkd.cli.doctor import check_pair as doctor_pair
from hf_detrkd.cli.doctor import check_teacher as doctor_teacher
from hf_detrkd.cli.doctor.findings import Report
from hf_detrkd.data.shapes import SHAPE_CLASSES, ShapesRecords
from tests import ROOT


QUICKSTART = ROOT / "scripts" / "recipes" / "quickstart"
IMAGES = 16  # of the evaluation split
SIDE = 128  # pixels

Box = Callable[[list[float]], list[float]]


def write_shapes(folder: Path, box: Box = list, splits: Sequence[tuple[str, int]] = ()) -> str:
    """Generated images as a COCO folder, with their boxes (x, y, width, height) written in some way."""
    for split, count in splits or (("train", 8), ("validation", IMAGES)):
        drawn = "train" if split == "train" else "validation"
        (folder / split).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        content: dict[str, list[Any]] = {"images": [], "annotations": []}
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(SHAPE_CLASSES)]
        for i, record in enumerate(ShapesRecords(count, 0, drawn)):
            (folder / split / f"{i}.png").write_bytes(picture(drawn, i))
            content["images"].append({"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE})
            for corners, category in zip(record.boxes.tolist(), record.categories.tolist(), strict=True):
                number = len(content["annotations"]) + 1
                content["annotations"].append(
                    {"id": number, "image_id": i, "category_id": category, "bbox": box(corners), "iscrowd": 0}
                )
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return str(folder)


@functools.cache
def picture(split: str, index: int) -> bytes:
    """A generated image as a PNG file, drawn once."""
    file = io.BytesIO()
    ShapesRecords(index + 1, 0, split)[index].load().save(file, "png")
    return file.getvalue()


def line(folder: Path, data: str, *more: str, teacher: str | Path = QUICKSTART / "teacher") -> list[str]:
    """The command line of a small run; of two values for an argument the last counts."""
    words = f"--dataset_name {data} --image_size {SIDE} --method kd_detr --content own --class_loss bce --use_cpu"
    words += f" --general_points 10 --per_device_train_batch_size 2 --max_steps 7 --output_dir {folder / 'out'}"
    words += f" --config_name {QUICKSTART / 'student_config.json'} --teacher_model_name_or_path {teacher}"
    return [*words.split(), "--per_device_eval_batch_size", str(IMAGES), *more]


def changed_teacher(folder: Path, file: str, **changes: Any) -> Path:
    """A copy of the quickstart's teacher with other entries in one of its files."""
    shutil.copytree(QUICKSTART / "teacher", folder / "teacher")
    content = json.loads((folder / "teacher" / file).read_text())
    (folder / "teacher" / file).write_text(json.dumps(content | changes))
    return folder / "teacher"


def answers(arguments: list[str]) -> Report:
    """What the doctor says of data and teacher, without a step."""
    report, parsed = Report(), distill_arguments.parse(arguments)
    splits = doctor_data.load_data(report, parsed)
    assert splits is not None
    trainer = doctor_pair.build_pair(report, parsed, splits, parsed.config.output_dir)
    doctor_teacher.check_teacher(report, trainer, splits, IMAGES)
    return report


def said(report: Report, subject: str, status: str) -> str:
    """The texts of a subject, all of which have a status."""
    found = [finding for finding in report.findings if finding["subject"] == subject]
    assert {finding["status"] for finding in found} == {status}, found
    return "\n".join(finding["text"] for finding in found)
