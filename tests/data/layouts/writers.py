"""The same images and boxes written in every layout that is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_detrkd.data import DetectionDataset


Splits = Mapping[str, DetectionDataset]


def image_of(record: Any, folder: Path) -> str:
    """Copies the image of a record; returns its file name."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(record.name, folder)
    return Path(record.name).name


def coco_of(data: DetectionDataset, folder: Path, prefix: str = "") -> dict[str, Any]:
    """The COCO JSON of a split, whose images are copied to a folder."""
    content = data.coco_ground_truth()
    for image, record in zip(content["images"], data.records, strict=True):
        image["file_name"] = prefix + image_of(record, folder)
    return content


def dump(content: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_coco(splits: Splits, root: Path) -> None:
    for name, data in splits.items():
        dump(coco_of(data, root / name), root / "annotations" / f"instances_{name}.json")


def write_coco_2017(splits: Splits, root: Path) -> None:
    for name, data in splits.items():
        dump(coco_of(data, root / f"{name}2017"), root / "annotations" / f"instances_{name}2017.json")
        dump({"captions": []}, root / "annotations" / f"captions_{name}2017.json")


def write_one_json_each(splits: Splits, root: Path) -> None:
    for name, data in splits.items():
        dump(coco_of(data, root / "images" / name), root / "annotations" / f"{name}.json")


def write_roboflow(splits: Splits, root: Path) -> None:
    for name, data in splits.items():
        folder = root / {"val": "valid"}.get(name, name)
        dump(coco_of(data, folder), folder / "_annotations.coco.json")


def write_label_studio(splits: Splits, root: Path) -> None:
    """One JSON for all, with the backslashes of Windows."""
    dump(coco_of(splits["train"], root / "images", "images\\"), root / "result.json")


def write_cvat(splits: Splits, root: Path) -> None:
    dump(coco_of(splits["train"], root / "images" / "default"), root / "annotations" / "instances_default.json")


def relative_lines(record: Any) -> list[str]:
    lines = []
    for (x, y, w, h), category in zip(record.boxes.tolist(), record.categories.tolist(), strict=True):
        cx, cy = (x + w / 2) / record.width, (y + h / 2) / record.height
        lines.append(f"{category} {cx:.9f} {cy:.9f} {w / record.width:.9f} {h / record.height:.9f}")
    return lines


def write_yolo(splits: Splits, root: Path) -> None:
    """Ultralytics' form."""
    content: dict[str, Any] = {"path": ".", "names": dict(enumerate(splits["train"].classes))}
    for name, data in splits.items():
        content[name] = f"images/{name}"
        write_labels(data, root / "images" / name, root / "labels" / name)
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def write_roboflow_yolo(splits: Splits, root: Path) -> None:
    content: dict[str, Any] = {"names": splits["train"].classes, "nc": len(splits["train"].classes)}
    for name, data in splits.items():
        folder = {"val": "valid"}.get(name, name)
        content[name] = f"../{folder}/images"
        write_labels(data, root / folder / "images", root / folder / "labels")
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def write_labels(data: DetectionDataset, images: Path, labels: Path) -> None:
    labels.mkdir(parents=True, exist_ok=True)
    for record in data.records:
        name = Path(image_of(record, images))
        (labels / name).with_suffix(".txt").write_text("\n".join(relative_lines(record)) + "\n")


def xml_of(record: Any, classes: list[str]) -> str:
    objects = "".join(
        f"<object><name>{classes[c]}</name><difficult>0</difficult><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
        f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for (x, y, w, h), c in zip(record.boxes.tolist(), record.categories.tolist(), strict=True)
    )
    size = f"<size><width>{record.width}</width><height>{record.height}</height><depth>3</depth></size>"
    return f"<annotation><filename>wrong.jpg</filename>{size}{objects}</annotation>"


def write_voc(splits: Splits, root: Path) -> None:
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for name, data in splits.items():
        names = []
        for record in data.records:
            file = Path(image_of(record, root / "JPEGImages"))
            (root / "Annotations" / file.name).with_suffix(".xml").write_text(xml_of(record, data.classes))
            names.append(file.stem)
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(names))


def write_xml_beside(splits: Splits, root: Path) -> None:
    for name, data in splits.items():
        folder = root / {"val": "valid"}.get(name, name)
        for record in data.records:
            file = Path(image_of(record, folder))
            (folder / file.name).with_suffix(".xml").write_text(xml_of(record, data.classes))


def write_imagefolder(splits: Splits, root: Path) -> None:
    for name, data in splits.items():
        folder = root / {"val": "validation"}.get(name, name)
        lines = []
        for record in data.records:
            objects = {"bbox": record.boxes.tolist(), "categories": [data.classes[c] for c in record.categories]}
            lines.append(json.dumps({"file_name": image_of(record, folder), "objects": objects}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))


WRITERS: dict[str, Callable[[Splits, Path], None]] = {
    "COCO": write_coco,
    "COCO 2017": write_coco_2017,
    "images/<split> with one JSON each": write_one_json_each,
    "Roboflow's COCO": write_roboflow,
    "YOLO": write_yolo,
    "Roboflow's YOLO": write_roboflow_yolo,
    "Pascal VOC": write_voc,
    "XML beside the images": write_xml_beside,
    "imagefolder": write_imagefolder,
}
WHOLE = {"Label Studio": write_label_studio, "CVAT": write_cvat}
"""Layouts without splits."""
