"""Computes the COCO metrics of a detector on a data set, or of a file of detections.

    hf-detrkd evaluate --model_name_or_path outputs/student --dataset_name path/to/folder

    hf-detrkd evaluate --annotations instances_val.json --detections found.json --output_file map.json

Any model that `AutoModelForObjectDetection` loads can be used. Its classes are matched with the data set's by name.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import EvalPrediction

from ..adapters import max_detections_of
from ..data import DetectionCollator, DetectionDataset, DetectionTransform, load_detection_split, parse_image_size
from ..data.pixels import normalized
from ..evaluation import (
    FIGURES,
    PADDING,
    CocoEvaluator,
    detections_from_predictions,
    gatherable,
    predictions_from_heads,
    references_from_labels,
)
from ..evaluation.coco_results import coco_results, evaluate_coco_files
from ..evaluation.evaluator import unpadded
from ..models.loading import load_detector, load_processor
from .arguments import NO_DATA
from .launching import check_processes
from .parser import make_parser
from .screen import run


MOST_CLASSES_SHOWN = 30


@dataclass
class EvaluateArguments:
    """Either a model and a data set, or files of annotations and detections."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of the detector."})
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the model on the Hub. Default: main."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, folder (COCO, KITTI, YOLO, Pascal VOC, `datasets` rows, imagefolder), or shapes, "
            "generated images. Required with a model."
        },
    )
    dataset_eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. Default: the first of validation, val, valid, val2017, dev, test."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a data set on the Hub that has several. Default: its own."}
    )
    eval_annotations_file: str | None = field(
        default=None,
        metadata={
            "help": "COCO JSON file of the images, which lie in the folder --dataset_name. Default: found by the "
            "layout."
        },
    )
    image_size: str | None = field(
        default=None,
        metadata={"help": "Image size, a number or HEIGHTxWIDTH in pixels. Default: the image processor's."},
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Maximum number of images to evaluate on. Default: all."}
    )
    skip_unreadable_images: bool = field(
        default=False,
        metadata={"help": "Drop and count images that are unreadable or missing instead of stopping. Default: false."},
    )
    max_detections: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of detections per image and of all classes that the model is judged by. Default: "
            "that of the family's authors, such as 300 for DINO and 100 for Deformable DETR."
        },
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Images per process and batch. Default: 8."})
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Data loading processes per process. Default: 0."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Do not use a GPU. Default: false."})
    annotations: str | None = field(default=None, metadata={"help": "JSON file of COCO ground truth."})
    detections: str | None = field(
        default=None,
        metadata={
            "help": "JSON file of COCO results (image_id, category_id, bbox, score), or of `hf-detrkd predict`."
        },
    )
    output_file: str | None = field(default=None, metadata={"help": "JSON file for all metrics. Default: none."})
    output_detections: str | None = field(
        default=None,
        metadata={
            "help": "JSON file for the model's detections as COCO results, which `hf-detrkd answer --detections` "
            "takes. Default: none."
        },
    )

    def __post_init__(self) -> None:
        parse_image_size(self.image_size)
        files = (self.annotations is not None, self.detections is not None)
        if files not in ((True, True), (False, False)) or any(files) == (self.model_name_or_path is not None):
            raise ValueError(
                "Give either --model_name_or_path, or both --annotations and --detections, got "
                f"{self.model_name_or_path!r}, {self.annotations!r} and {self.detections!r}."
            )
        if self.dataset_name is None and not any(files):
            raise ValueError(NO_DATA)
        if self.per_device_eval_batch_size < 1:
            raise ValueError(f"--per_device_eval_batch_size must be 1 or more, got {self.per_device_eval_batch_size}.")
        if self.max_detections is not None and self.max_detections < 1:
            raise ValueError(f"--max_detections must be 1 or more, got {self.max_detections}.")


def data_set_numbers(id2label: Mapping[int, str], classes: Sequence[str]) -> Tensor:
    """The data set's number of each of the model's classes; detections of other classes are ignored.

    Args:
        id2label (`dict[int, str]`): the model's classes.
        classes (`list[str]`): the data set's.

    Returns:
        `torch.LongTensor` of shape `(num_model_classes,)`

    Raises:
        ValueError: the model lacks classes of the data set.
    """
    known = set(id2label.values())
    missing = [name for name in classes if name not in known]
    if missing:
        raise ValueError(
            f"The model must know all {len(classes)} classes of the data set by name, but lacks {missing[:10]}; its "
            f"own are {sorted(known)[:10]}: rename them in id2label of its config, or choose another data set."
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return torch.tensor([numbers.get(id2label[i], PADDING) for i in range(len(id2label))])


def load_data(arguments: EvaluateArguments) -> DetectionDataset:
    """The data set with the preprocessing of the model's image processor."""
    processor = load_processor(str(arguments.model_name_or_path), revision=arguments.model_revision)
    file = arguments.eval_annotations_file
    dataset = load_detection_split(
        cast(str, arguments.dataset_name),
        arguments.dataset_eval_split,
        max_samples=arguments.max_eval_samples,
        skip_unreadable_images=arguments.skip_unreadable_images,
        annotations=None if file is None else {"val": Path(file).expanduser()},
        config_name=arguments.dataset_config_name,
    )
    size = parse_image_size(arguments.image_size)
    return dataset.with_transform(DetectionTransform.for_processor(processor, size=size, normalize=False))


def evaluate_model(arguments: EvaluateArguments, accelerator: Accelerator) -> dict[str, float]:
    """The metrics of a model, the same in every process."""
    name, revision = str(arguments.model_name_or_path), arguments.model_revision
    model = load_detector(name, revision=revision)
    model = model.to(accelerator.device).eval()
    dataset = load_data(arguments)
    numbers = data_set_numbers(model.config.id2label, dataset.classes).to(accelerator.device)
    loader = accelerator.prepare(
        DataLoader(
            dataset,
            batch_size=arguments.per_device_eval_batch_size,
            num_workers=arguments.dataloader_num_workers,
            collate_fn=DetectionCollator(),
        )
    )
    limit = arguments.max_detections or max_detections_of(model.config)
    evaluator, figures = CocoEvaluator(dict(enumerate(dataset.classes))), {}
    kept: list[dict[str, Any]] = []
    for batch in tqdm(loader, "Evaluating", unit="batch", disable=not accelerator.is_main_process):
        batch = normalized(batch)
        labels = batch.pop("labels")
        with torch.inference_mode():
            outputs = model(**batch)
        predictions = predictions_from_heads(outputs.logits, outputs.pred_boxes, model.config.num_labels)
        sizes = torch.stack([label["orig_size"] for label in labels])
        found = detections_from_predictions(predictions, sizes, limit)
        found = [{**image, "labels": numbers[image["labels"]]} for image in found]
        padded = accelerator.pad_across_processes(
            gatherable(found, references_from_labels(labels)), dim=1, pad_index=PADDING
        )
        last = accelerator.gradient_state.end_of_dataloader
        gathered = accelerator.gather_for_metrics(padded)
        if arguments.output_detections is not None and accelerator.is_main_process:
            detections, truth = gathered
            kept += coco_results(unpadded(detections, truth["image_id"].cpu().numpy()), dataset.category_ids)
        figures = evaluator(EvalPrediction(*gathered), compute_result=last)
    if arguments.output_detections is not None and accelerator.is_main_process:
        write_json(Path(arguments.output_detections), kept)
    return figures


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file, and its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2 if isinstance(content, dict) else None) + "\n")


def table(figures: Mapping[str, float]) -> str:
    """The metrics as text, in percent; a dash if there is no ground truth."""

    def percent(name: str) -> str:
        return "-" if figures[name] < 0 else f"{100 * figures[name]:.1f}"

    def line(title: str, cells: Sequence[str]) -> str:
        return f"{title:4}" + "".join(f"{cell:>10}" for cell in cells)

    lines = [
        line("", ["all", "IoU 0.50", "IoU 0.75", "small", "medium", "large"]),
        line("mAP", [percent(name) for name in FIGURES[:6]]),
        "",
        line("", ["1 box", "10 boxes", "100", "small", "medium", "large"]),
        line("mAR", [percent(name) for name in FIGURES[6:]]),
    ]
    classes = [name for name in figures if name not in FIGURES]
    if len(classes) > MOST_CLASSES_SHOWN:
        return "\n".join([*lines, "", f"The mAP of each of the {len(classes)} classes is in --output_file."])
    width = max(len(name.removeprefix("map_")) for name in classes)
    lines += ["", "mAP by class", *(f"{name.removeprefix('map_'):{width}}{percent(name):>8}" for name in classes)]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    check_processes()
    parser = make_parser(EvaluateArguments, __doc__, prog="hf-detrkd evaluate")
    (arguments,) = parser.parse_args_into_dataclasses(args=argv)
    if arguments.model_name_or_path is None:
        figures, main_process = evaluate_coco_files(arguments.annotations, arguments.detections), True
    else:
        accelerator = Accelerator(cpu=arguments.use_cpu)
        figures, main_process = evaluate_model(arguments, accelerator), accelerator.is_main_process
        if main_process and accelerator.num_processes > 1:
            print(f"Evaluated on {accelerator.num_processes} processes.")
        accelerator.end_training()
    if main_process:
        print(table(figures))
        if arguments.output_file is not None:
            write_json(Path(arguments.output_file), figures)


if __name__ == "__main__":
    sys.exit(run(main))
