"""Everything that reads what people give: a sound input, and what reads it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow
import yaml
from PIL import Image

from hf_detrkd.answers.manifest import Manifest
from hf_detrkd.artifacts.html_report import write_report
from hf_detrkd.artifacts.model_card import write_card
from hf_detrkd.artifacts.run_folder import Run, check_free
from hf_detrkd.artifacts.whole_checkpoints import resolved_checkpoint, seal
from hf_detrkd.cli.arguments import parse
from hf_detrkd.data import AugmentationConfig, DetectionTransform, load_detection_split
from hf_detrkd.data.images import read_image, read_size
from hf_detrkd.data.records import ImageRecord
from hf_detrkd.distillation.class_map import read_class_map
from hf_detrkd.distillation.schedule import DistillationSchedule
from hf_detrkd.evaluation.coco_results import read_coco_files
from hf_detrkd.training.config import DistillationConfig


Read = Callable[[Path], Any]


def picture(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    """A file of an image of 20 x 16 pixels."""
    stream = io.BytesIO()
    pixels = np.arange(20 * 16 * 3, dtype=np.uint8).reshape(16, 20, 3)
    Image.fromarray(pixels).convert("L" if mode.startswith("I") else mode).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def png() -> bytes:
    return picture("PNG")


PICTURES = {
    "1.png": png(),
    "2.png": picture("PNG", "I;16"),
    "3.png": picture("PNG", "P", transparency=0),
    "1.jpg": picture("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    "2.jpg": picture("JPEG", "CMYK"),
    "1.bmp": picture("BMP"),
    "1.gif": picture("GIF", "P"),
    "1.webp": picture("WEBP"),
    "1.tiff": picture("TIFF", compression="tiff_lzw"),
    "2.tiff": picture("TIFF", "F"),
}
"""Image files of many kinds: two are turned or inverted by their header, others have 16 bits, a palette or floats."""


COCO = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 16} for i in (1, 2)],
    "annotations": [
        {"id": i, "image_id": 1 + i % 2, "category_id": 1 + i % 2, "bbox": [1, 2, 8, 9], "area": 72, "iscrowd": 0}
        for i in (1, 2, 3)
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}
RESULTS = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 8, 9], "score": 0.5}]
RECIPE = {
    "model_name_or_path": "x",
    "dataset_name": "shapes",
    "method": "kd_detr",
    "image_size": "64x96",
    "learning_rate": 1e-4,
    "max_steps": 5,
    "loss_weights": {"kd_detr_class": 1.0},
    "freeze": ["backbone"],
    "bf16": False,
    "general_points": 7,
    "short_sides": [64, 96],
    "save_strategy": "no",
}
SCHEDULE = {"shape": "linear", "warmup": 0.1, "stop": 0.9}
AUGMENTATION = {"horizontal_flip": 0.5, "min_scale": 0.5, "max_scale": 1.5, "short_sides": [32, 48], "detr_crop": 0.5}
PROCESSOR = {
    "size": {"height": 16, "width": 24},
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.2, 0.3],
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_resize": True,
}
ROWS = [
    {
        "image_id": i,
        "image": {"bytes": png(), "path": "a.png"},
        "width": 20,
        "height": 16,
        "objects": {"id": [i], "area": [72.0], "bbox": [[1.0, 2.0, 8.0, 9.0]], "category": [0]},
    }
    for i in (1, 2)
]
ROW = {"map": 0.3, "map_50": 0.5, "map_75": 0.2, "parameters": 10, "seconds_per_step": 0.1, "classes": {"cat": 0.3}}
SUMMARY = {"teacher": ROW, "control": ROW, "distilled": ROW | {"gflops": 1.0, "image_size": [16, 16]}}
FACTS = {
    "dataset_name": "cats",
    "method": "kd_detr",
    "teacher": {"name": "t", "source": "folder", "revision": None},
    "classes": ["cat"],
    "versions": {"torch": "2"},
    "arguments": {"learning_rate": 0.1},
    "eval_images": 3,
    "image_size": [16, 16],
}


def dump(value: Any) -> bytes:
    """JSON, or YAML where JSON cannot say it."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def coco(folder: Path) -> None:
    for name in ("1.png", "2.png"):
        (folder / "val").mkdir(exist_ok=True)
        (folder / "val" / name).write_bytes(png())
    load_detection_split(folder, "val")


def yolo(folder: Path) -> None:
    (folder / "images" / "val").mkdir(parents=True, exist_ok=True)
    (folder / "images" / "val" / "1.png").write_bytes(png())
    load_detection_split(folder, "val")


def voc(folder: Path) -> None:
    (folder / "JPEGImages").mkdir(exist_ok=True)
    (folder / "JPEGImages" / "1.png").write_bytes(png())
    load_detection_split(folder, "val")


def run_folder(folder: Path) -> None:
    run = Run.read(folder)
    write_card(run)
    write_report(run)


def checkpoint(folder: Path) -> None:
    resolved_checkpoint(str(folder / "checkpoint-3"), folder)


def results(folder: Path) -> None:
    (folder / "truth.json").write_bytes(dump(COCO))
    read_coco_files(folder / "truth.json", folder / "r.json")


def manifest(folder: Path) -> None:
    Manifest.read(folder)


def image(name: str) -> Read:
    def read(folder: Path) -> None:
        read_image(str(folder / name), name)
        read_size(str(folder / name))

    return read


def kitti(folder: Path) -> None:
    (folder / "image_2").mkdir(exist_ok=True)
    (folder / "image_2" / "000001.png").write_bytes(png())
    load_detection_split(folder, "val")


def rows(value: Any) -> None:
    """Rows that Arrow can hold, read as a data set."""
    try:
        given = datasets.Dataset.from_list(value).cast_column("image", datasets.Image())
    except (pyarrow.ArrowException, TypeError, AttributeError, ValueError, OverflowError, UnicodeError, LookupError):
        return  # refused before it is a data set
    load_detection_split({"val": given}, "val")


def processor_of(value: Any) -> None:
    """The transform of an image processor with these values, applied to an image; its pixels must be finite."""
    if not isinstance(value, dict):
        return
    transform = DetectionTransform.for_processor(SimpleNamespace(**{"do_normalize": False, "size": {}} | value))
    empty = np.zeros((0, 4))
    nothing = np.zeros(0)
    record = ImageRecord(1, "x", lambda: None, empty, nothing.astype(int), nothing, nothing.astype(bool), 20, 16)  # type: ignore[arg-type, return-value]
    pixels = transform(Image.open(io.BytesIO(png())), record, 0)["pixel_values"]
    assert pixels.isfinite().all(), f"pixels that are not finite from {value}"


def arguments(value: Any) -> None:
    if isinstance(value, dict):
        DistillationConfig("out", use_cpu=True, **{k: v for k, v in value.items() if k in CONFIG})


CONFIG = {
    "method": "kd_detr",
    "loss_weights": {"kd_detr_class": 1.0},
    "learning_rate_factors": {"a": 0.1},
    "distillation_weight": 1.0,
    "calibrate_weights": "auto",
    "calibration_fraction": 0.3,
    "gradient_ratio_steps": 5,
    "max_gradient_ratio": 10.0,
    "ema_decay": 0.9,
    "max_detections": 30,
    "teacher_image_size": "64",
    "unlabeled_fraction": 0.5,
    "augmentation_views": 2,
    "teacher_dtype": "float32",
    "distillation_warmup": 0.1,
    "class_loss_weight": 2.0,
    "per_device_train_batch_size": 2,
}

FILES: dict[str, tuple[str, bytes, Read]] = {
    "recipe": ("r.yaml", yaml.safe_dump(RECIPE).encode(), lambda f: parse(["--config", str(f / "r.yaml")])),
    "class map": ("m.yaml", b"cat: dog\nbird: null\n", lambda f: read_class_map(f / "m.yaml")),
    "recipe of a folder": (
        "recipe.yaml",
        yaml.safe_dump(RECIPE).encode(),
        lambda f: check_free(f, {"method": "a"}, False),
    ),
    "coco": ("annotations/instances_val.json", dump(COCO), coco),
    "coco results": ("r.json", dump(RESULTS), results),
    "yolo labels": ("labels/val/1.txt", b"0 0.5 0.5 0.2 0.1\n1 0.1 0.1 0.2 0.1 0.2 0.4\n", yolo),
    "yolo config": ("data.yaml", b"path: .\nnames: {0: cat, 1: dog}\nval: images/val\n", yolo),
    "voc": (
        "Annotations/1.xml",
        b"<annotation><size><width>20</width><height>16</height></size><object><name>cat</name><difficult>0</difficult>"
        b"<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>",
        voc,
    ),
    **{f"image {name}": (name, content, image(name)) for name, content in PICTURES.items()},
    "kitti labels": (
        "label_2/000001.txt",
        b"Car 0.0 0 1.5 1 2 9 12 1.5 1.6 3.7 1 2 3 0.5\nDontCare -1 -1 -10 3 3 8 8 -1 -1 -1 -1000 -1000 -1000 -10\n",
        kitti,
    ),
    "kitti list": ("ImageSets/val.txt", b"000001\n", kitti),
    "summary": ("summary.json", dump(SUMMARY), run_folder),
    "facts": ("run.json", dump(FACTS), run_folder),
    "results": ("all_results.json", b'{"eval_map": 0.5}', run_folder),
    "manifest of answers": ("manifest.json", b"", manifest),
    "manifest of a checkpoint": ("checkpoint-3/manifest.json", b"", checkpoint),
}
"""By name: the file that is broken, its sound content, and what reads its folder."""

VALUES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "processor": (PROCESSOR, processor_of),
    "schedule": (SCHEDULE, lambda v: DistillationSchedule(**_known(v, SCHEDULE))(1, 10)),
    "augmentation": (AUGMENTATION, lambda v: AugmentationConfig(**_known(v, AUGMENTATION))),
    "config": (CONFIG, arguments),
    "rows": (ROWS, rows),
}
"""By name: values in place of files."""

STRUCTURED = {"coco": COCO, "coco results": RESULTS, "recipe": RECIPE, "summary": SUMMARY, "facts": FACTS}
"""The values of some files, which are broken as values, too."""


def _known(value: Any, sound: dict[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in value.items() if name in sound} if isinstance(value, dict) else {}


def prepare(name: str, folder: Path) -> bytes:
    """Writes what the reader of a file needs beside it; the file's sound content."""
    file, content, _ = FILES[name]
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    if name in ("summary", "facts", "results"):
        for other in ("summary", "facts", "results"):
            (folder / FILES[other][0]).write_bytes(FILES[other][1])
    if name == "yolo labels":
        (folder / "data.yaml").write_bytes(FILES["yolo config"][1])
    if name == "yolo config":
        (folder / "labels" / "val").mkdir(parents=True)
        (folder / "labels" / "val" / "1.txt").write_bytes(FILES["yolo labels"][1])
    if name == "kitti list":
        (folder / "label_2").mkdir()
        (folder / "label_2" / "000001.txt").write_bytes(FILES["kitti labels"][1])
    if name == "voc":
        (folder / "ImageSets" / "Main").mkdir(parents=True)
        (folder / "ImageSets" / "Main" / "val.txt").write_text("1\n")
    if name == "manifest of a checkpoint":
        (folder / "checkpoint-3" / "config.json").write_text("{}")
        seal(folder / "checkpoint-3")
        return (folder / file).read_bytes()
    return content
