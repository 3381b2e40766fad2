"""Detects objects in an image or in all images of a folder.

    hf-detrkd predict --model_name_or_path outputs/student --input photo.jpg

    hf-detrkd predict --model_name_or_path PekingU/rtdetr_r18vd --input photos --output_dir found

Writes each image with its boxes, under its own name, and `predictions.json`: a COCO object (boxes as x, y, width and
height in pixels of the upright image) whose annotations also have `label` and `score`.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..adapters import max_detections_of
from ..artifacts.draw_boxes import class_colors, draw_detections
from ..data import UnreadableImageError
from ..data.images import IMAGES, images_in, read_image
from ..evaluation import detections_from_predictions, predictions_from_heads
from ..models.loading import load_detector, load_processor
from .parser import make_parser


@dataclass
class PredictArguments:
    """The model, its input images and the output."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the detector."})
    input: str = field(metadata={"help": "Image file, or folder of images and folders."})
    output_dir: str = field(
        default="predictions", metadata={"help": "Folder for images and predictions.json. Default: predictions."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the model on the Hub. Default: main."}
    )
    threshold: float = field(default=0.5, metadata={"help": "Minimum score of a detection. Default: 0.5."})
    max_detections: int | None = field(
        default=None,
        metadata={"help": "Maximum number of detections per image. Default: that of the family's authors."},
    )
    batch_size: int = field(default=8, metadata={"help": "Images per batch. Default: 8."})
    device: str | None = field(
        default=None, metadata={"help": "Device, such as cuda:1 or cpu. Default: a GPU, if any."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold must lie in [0, 1], got {self.threshold}.")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size must be 1 or more, got {self.batch_size}.")
        if self.max_detections is not None and self.max_detections < 1:
            raise ValueError(f"--max_detections must be 1 or more, got {self.max_detections}.")
        folder = Path(self.input) if Path(self.input).is_dir() else Path(self.input).parent
        if Path(self.output_dir).resolve() == folder.resolve():
            raise ValueError(
                f"--output_dir must not be the folder of the images, which it would overwrite, got {folder}."
            )


def find_images(source: Path, output: Path | None = None) -> list[Path]:
    """The image files of a folder and of those in it, in order, or the file itself.

    Args:
        source (`Path`): a folder or a file.
        output (`Path`, *optional*): a folder whose images are left out.

    Raises:
        ValueError: there is none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ValueError(f"--input must be an image or a folder of images, but {source} does not exist.")
    files = images_in(source)
    if output is not None:
        files = [file for file in files if not file.resolve().is_relative_to(output.resolve())]
    if not files:
        raise ValueError(f"--input must hold images ({', '.join(sorted(IMAGES))}), but {source} holds none.")
    return files


def place_in(source: Path, file: Path) -> Path:
    """The path of an image of [`find_images`], relative to the folder."""
    return file.relative_to(source if source.is_dir() else source.parent)


def read_batches(files: list[Path], batch_size: int) -> Iterator[tuple[list[Path], list[Image.Image]]]:
    """Images in batches; unreadable ones are reported and skipped.

    Raises:
        ValueError: none can be read.
    """
    names: list[Path] = []
    images: list[Image.Image] = []
    unreadable = 0
    for file in tqdm(files, "Predicting", unit="image"):
        try:
            image = read_image(file, str(file))
        except UnreadableImageError as error:
            unreadable += 1
            tqdm.write(f"Skipped {file}: {error.__cause__}", sys.stderr)
            continue
        names, images = [*names, file], [*images, image]
        if len(images) == batch_size:
            yield names, images
            names, images = [], []
    if images:
        yield names, images
    if unreadable == len(files):
        raise ValueError(f"--input must hold images that can be read, but none of the {unreadable} can.")


def detect(
    model: PreTrainedModel, processor: Any, images: list[Image.Image], limit: int | None = None
) -> list[dict[str, Tensor]]:
    """The best detections of every image, in pixels, on the CPU; `limit` is by default the family's."""
    inputs = processor(images=images, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        outputs = model(**inputs)
    return detections_of(model, outputs, images, limit)


def detections_of(
    model: PreTrainedModel, outputs: Any, images: list[Image.Image], limit: int | None = None
) -> list[dict[str, Tensor]]:
    """The detections in a model's outputs, see [`detect`]."""
    predictions = predictions_from_heads(outputs.logits, outputs.pred_boxes, model.config.num_labels)
    sizes = [(image.height, image.width) for image in images]
    found = detections_from_predictions(predictions, sizes, limit or max_detections_of(model.config))
    return [{name: value.cpu() for name, value in image.items()} for image in found]


def above(found: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """The detections of an image whose score is at least the threshold."""
    sure = (found["scores"] >= threshold) & (found["scores"] > 0)  # 0 is padding after NMS
    return {name: value[sure] for name, value in found.items()}


def annotations_of(found: dict[str, Tensor], labels: list[str], image_id: int, first_id: int) -> list[dict[str, Any]]:
    """One image's detections as COCO annotations."""
    rows = zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), labels, strict=True)
    return [
        {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": number,
            "label": label,
            "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
            "area": round((right - left) * (bottom - top), 2),
            "iscrowd": 0,
            "score": round(score, 4),
        }
        for i, ((left, top, right, bottom), number, score, label) in enumerate(rows)
    ]


def main(argv: list[str]) -> None:
    parser = make_parser(PredictArguments, __doc__, prog="hf-detrkd predict")
    (arguments,) = parser.parse_args_into_dataclasses(args=argv)
    source = Path(arguments.input)
    files = find_images(source, Path(arguments.output_dir))
    name, revision = arguments.model_name_or_path, arguments.model_revision
    model = load_detector(name, revision=revision)
    model = model.to(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    processor = load_processor(name, revision=revision)
    folder, id2label, limit = Path(arguments.output_dir), model.config.id2label, arguments.max_detections
    folder.mkdir(parents=True, exist_ok=True)
    colors = class_colors(id2label.values())
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    best = 0.0
    for paths, pictures in read_batches(files, arguments.batch_size):
        for path, picture, found in zip(paths, pictures, detect(model, processor, pictures, limit), strict=True):
            kept = above(found, arguments.threshold)
            best = max([best, *found["scores"].tolist()])
            labels = [id2label[number] for number in kept["labels"].tolist()]
            place = place_in(source, path)
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            draw_detections(picture, kept["boxes"], labels, kept["scores"], colors).save(folder / place)
            size = {"width": picture.width, "height": picture.height}
            images.append({"id": len(images) + 1, "file_name": place.as_posix(), **size})
            annotations += annotations_of(kept, labels, len(images), len(annotations) + 1)
    categories = [{"id": number, "name": label} for number, label in id2label.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "predictions.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"Found {len(annotations)} objects in {len(images)} images; drawings and predictions.json are in {folder}.")
    if not annotations:
        print(f"No score reaches --threshold {arguments.threshold:g}: the best is {best:.2g}.")
