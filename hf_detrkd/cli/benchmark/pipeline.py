"""`benchmark.py pipeline`: images a second of a core, from the file to the batch, ours beside two others."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import RTDetrImageProcessor

from ...data import (
    AugmentationConfig,
    DetectionCollator,
    DetectionDataset,
    DetectionTransform,
    load_detection_split,
    parse_image_size,
)
from ...data.records import ImageRecord


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
Size = tuple[int, int]
Batch = Callable[[list[int]], Any]
"""Reads the images at some places of a data set, and makes a batch of them."""


def add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset_name", required=True, help="Photographs with boxes: a folder or Hub id.")
    parser.add_argument("--image_size", default="640", help="A number or HEIGHTxWIDTH in pixels. Default: 640.")
    parser.add_argument("--teacher_image_size", default="800", help="Of the view for a teacher. Default: 800.")
    parser.add_argument("--batch_size", type=int, default=8, help="Images per batch. Default: 8.")
    parser.add_argument("--images", type=int, default=64, help="Images of the data set to read. Default: 64.")
    parser.add_argument("--repeats", type=int, default=5, help="Timed passes; their median is reported. Default: 5.")
    parser.set_defaults(run=pipeline)


def pipeline(given: argparse.Namespace) -> dict[str, Any]:
    """Prints the table and returns its figures."""
    size, seen = (parse_image_size(text) for text in (given.image_size, given.teacher_image_size))
    assert size is not None and seen is not None  # None only for None
    data = load_detection_split(given.dataset_name, max_samples=given.images)
    ways = {
        "training": {
            "hf_detrkd": ours(data, size, AugmentationConfig()),
            "torchvision's reference": reference(data, size, True),
        },
        "training, with a view for a teacher": {"hf_detrkd": ours(data, size, AugmentationConfig(), seen)},
        "evaluation": {"hf_detrkd": ours(data, size, None), "torchvision's reference": reference(data, size, False)},
    }
    for kind, trains in (("training", True), ("evaluation", False)):
        other = example(data, size, trains)
        if other is not None:
            ways[kind]["transformers' example"] = other
    parts = [list(range(start, len(data)))[: given.batch_size] for start in range(0, len(data), given.batch_size)]
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in tqdm(range(given.repeats), desc="Passes", leave=False):  # in turns
        for kind, ways_of_kind in ways.items():
            for name, batch in ways_of_kind.items():
                taken.setdefault((kind, name), []).append(seconds(batch, parts) / len(data))
    found = {kind: {name: 1 / statistics.median(taken[kind, name]) for name in each} for kind, each in ways.items()}
    print(f"images a second of CPU time, {size[0]}x{size[1]} pixels, batches of {given.batch_size}\n{table(found)}")
    return {"images": len(data), "image_size": list(size), "images_per_second": found}


def seconds(batch: Batch, parts: list[list[int]]) -> float:
    """CPU time of a pass: other processes do not count."""
    start = time.process_time()
    for places in parts:
        batch(places)
    return time.process_time() - start


def ours(
    data: DetectionDataset, size: Size, augmentation: AugmentationConfig | None, teacher: Size | None = None
) -> Batch:
    """As in `distill.py`: bytes, which become floats on the device."""
    transform = DetectionTransform(size, MEAN, STD, augmentation, teacher, normalize=False)
    shown, collate = data.with_transform(transform), DetectionCollator()
    return lambda places: collate([shown[place] for place in places])


def reference(data: DetectionDataset, size: Size, trains: bool) -> Batch:
    """The transforms of torchvision's detection reference for SSD, with its v2 classes, and a fixed size."""
    varied = [
        v2.RandomPhotometricDistort(),
        v2.RandomZoomOut(fill={tv_tensors.Image: (123.0, 117.0, 104.0), "others": 0}),
        v2.RandomIoUCrop(),
        v2.RandomHorizontalFlip(),
    ]
    last = [v2.Resize(size, antialias=True), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    whole = v2.Compose(
        [v2.ToImage(), *(varied if trains else []), *last, *([v2.SanitizeBoundingBoxes()] if trains else [])]
    )

    def batch(places: list[int]) -> Any:
        items = []
        for record in (data.records[place] for place in places):
            image = read(record)
            canvas = (image.height, image.width)
            boxes = tv_tensors.BoundingBoxes(torch.from_numpy(record.boxes), format="XYWH", canvas_size=canvas)
            items.append(whole(image, {"boxes": boxes, "labels": torch.from_numpy(record.categories)}))
        return torch.stack([pixels for pixels, _ in items]), [target for _, target in items]

    return batch


def example(data: DetectionDataset, size: Size, trains: bool) -> Batch | None:
    """Augmentation by albumentations, as near to ours as it goes, and an image processor, as in transformers' example
    of object detection; `None` where albumentations is not installed."""
    try:
        import albumentations as A
    except ImportError:
        print("albumentations is not installed: transformers' example is left out (pip install albumentations).")
        return None
    varied = [
        A.RandomScale((-0.4, 0.6), p=0.5),
        A.BBoxSafeRandomCrop(p=0.3),
        A.ColorJitter(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05, p=0.5),
        A.HorizontalFlip(p=0.5),
    ]
    boxes = A.BboxParams(format="coco", label_fields=["category"], clip=True, min_area=25)
    augment = A.Compose(varied if trains else [A.NoOp()], bbox_params=boxes)
    processor = RTDetrImageProcessor(size={"height": size[0], "width": size[1]}, do_normalize=True)
    return lambda places: processed([data.records[place] for place in places], augment, processor)


def processed(records: list[ImageRecord], augment: Any, processor: Any) -> Any:
    """What the example does in its `augment_and_transform_batch`."""
    images, annotations = [], []
    for record in records:
        shown = augment(
            image=np.array(read(record)), bboxes=record.boxes.tolist(), category=record.categories.tolist()
        )
        images.append(shown["image"])
        entries = [
            {
                "image_id": record.image_id,
                "category_id": int(c),
                "iscrowd": 0,
                "area": float(b[2] * b[3]),
                "bbox": list(b),
            }
            for c, b in zip(shown["category"], shown["bboxes"], strict=True)
        ]
        annotations.append({"image_id": record.image_id, "annotations": entries})
    return processor(images=images, annotations=annotations, return_tensors="pt")


def read(record: ImageRecord) -> Image.Image:
    return Image.open(record.name).convert("RGB")


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown, with our figure relative to that of each."""
    lines = ["| | | images / s | hf_detrkd / this |", "|---|---|---|---|"]
    for kind, figures in found.items():
        for name, value in figures.items():
            lines.append(f"| {kind} | {name} | {value:.1f} | {figures['hf_detrkd'] / value:.2f} |")
    return "\n".join(lines)
