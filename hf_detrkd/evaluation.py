"""COCO box AP of detectors, streaming: inside training, and over several processes.

The road of a batch: [`detections_from_predictions`] and [`references_from_labels`] bring answers and truth into pixels
of the original images, [`gatherable`] pads both into tensors that `Trainer` and `accelerate` gather and truncate as
they are, and [`CocoEvaluator`] hands them to [`CocoBoxMetric`], which keeps them in an Arrow file until it computes.
Boxes are `(x_min, y_min, x_max, y_max)` in pixels all the way, as the image processors'
`post_process_object_detection` gives them; only COCO's files and library see `(x, y, width, height)`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.distributed as dist
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_area, box_convert
from transformers import EvalPrediction

from .outputs import Predictions


@contextmanager
def _scripts_hidden() -> Iterator[None]:
    """`import evaluate` means the library also for a script that has an `evaluate.py` beside it, as in `scripts/`."""
    path = sys.path[:]
    sys.path[:] = [folder for folder in path if not Path(folder, "evaluate.py").is_file()]
    try:
        yield
    finally:
        sys.path[:] = path


with _scripts_hidden():
    import evaluate


MAX_DETECTIONS = 100
PADDING = -100  # what Trainer and accelerate pad with; the class of a row that is no box

PRECISIONS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
RECALLS = ("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")
FIGURES = PRECISIONS + RECALLS  # in the official evaluator's order
CURVE_THRESHOLDS = {"50": 0, "75": 5}  # IoU in percent, and its place among the evaluator's ten thresholds

Curves = dict[str, dict[str, list[float]]]  # precision over recall, by IoU in percent and class


def detections_from_predictions(
    predictions: Predictions, sizes: Tensor | Sequence[tuple[int, int]]
) -> list[dict[str, Tensor]]:
    """The best 100 detections of every image, best first, as the image processors' post-processing finds them.

    With sigmoid heads these are the best pairs of query and class (a query may answer twice), with softmax heads every
    query's best class. No threshold: average precision needs the weak answers too.

    Args:
        predictions ([`Predictions`]): answers of the last decoder layer, boxes in [0, 1] of the image.
        sizes (`torch.Tensor` of shape `(batch_size, 2)`): height and width of the original images, in pixels.

    Returns:
        `list[dict[str, torch.Tensor]]`: one per image, on the device of the predictions: `scores` and `labels` of
        shape `(num_detections,)`, `boxes` of shape `(num_detections, 4)`, corners in pixels. All images have equally
        many.
    """
    scores, num_classes = predictions.scores(), predictions.num_classes
    sizes = torch.as_tensor(sizes, device=scores.device)
    if sizes.shape != (len(scores), 2):
        raise ValueError(f"sizes must be (height, width) of {len(scores)} images, got shape {tuple(sizes.shape)}")
    if predictions.activation == "softmax":
        scores, classes = scores.max(-1)
        scores, rows = scores.topk(min(MAX_DETECTIONS, scores.shape[1]))
        classes = classes.gather(1, rows)
    else:
        scores, cells = scores.flatten(1).topk(min(MAX_DETECTIONS, scores[0].numel()))
        rows, classes = cells // num_classes, cells % num_classes
    height, width = sizes.unbind(1)
    boxes = box_convert(predictions.boxes.float(), "cxcywh", "xyxy")
    boxes = boxes * torch.stack([width, height, width, height], dim=1).to(boxes)[:, None]
    boxes = boxes.gather(1, rows[..., None].expand(-1, -1, 4))
    return [
        {"scores": s, "labels": c, "boxes": b}
        for s, c, b in zip(scores.unbind(), classes.unbind(), boxes, strict=True)
    ]


def predictions_from_heads(logits: Tensor, boxes: Tensor, num_classes: int) -> Predictions:
    """What a plain model of any family answered (its `logits` and `pred_boxes`): with one column more than classes its
    head is softmax and that column no-object, else it is sigmoid."""
    return Predictions(logits, boxes, activation="softmax" if logits.shape[-1] > num_classes else "sigmoid")


def references_from_labels(labels: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The truth of every image as the metric takes it, from labels as the collator makes them.

    Args:
        labels (`list[dict[str, torch.Tensor]]`): one per image, with `image_id` `(1,)`, `class_labels` `(num_boxes,)`,
            `boxes` `(num_boxes, 4)`, center, width and height in [0, 1] of the image, `orig_size` `(2,)`, height and
            width in pixels, and where present `area` `(num_boxes,)` in square pixels (default: the boxes' areas),
            `iscrowd` `(num_boxes,)` (default: 0), and `crowd_boxes`, `crowd_labels`, `crowd_area`: crowd regions, in
            which a detection may lie without being wrong.

    Returns:
        `list[dict[str, torch.Tensor]]`: `image_id` of shape `()`, `boxes` (corners in pixels), `labels`, `area`,
        `iscrowd`.
    """
    return [_reference(label) for label in labels]


def _reference(label: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One image: boxes first, crowd regions after them."""
    height, width = label["orig_size"].unbind()
    scale = torch.stack([width, height, width, height])
    boxes, classes = label["boxes"] * scale, label["class_labels"]
    crowd = label.get("crowd_boxes", boxes[:0]) * scale
    corners = box_convert(torch.cat([boxes, crowd]), "cxcywh", "xyxy")
    area = box_area(corners)
    return {
        "image_id": label["image_id"].reshape(()),
        "boxes": corners,
        "labels": torch.cat([classes, label.get("crowd_labels", classes[:0])]),
        "area": torch.cat([label.get("area", area[: len(boxes)]), label.get("crowd_area", area[len(boxes) :])]),
        "iscrowd": torch.cat([label.get("iscrowd", torch.zeros_like(classes)), classes.new_ones(len(crowd))]),
    }


def gatherable(
    detections: Sequence[Mapping[str, Tensor]], references: Sequence[Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pads a batch into what `prediction_step` returns as predictions and labels.

    `Trainer` pads the second dimension over processes with -100, concatenates the first and cuts off the images that
    the sampler repeated: tensors of shape `(batch_size, num_boxes, ...)` go through all of it as they are, on any
    backend. Lists of dicts would need `eval_use_gather_object`, which `Trainer` forgets after its first evaluation:
    the second one hangs. Nothing here waits for the device.

    Args:
        detections (`list[dict[str, torch.Tensor]]`): see [`detections_from_predictions`].
        references (`list[dict[str, torch.Tensor]]`): see [`references_from_labels`].

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]`: the same fields; a row with label -100 is no box.
    """
    fields = ("boxes", "labels", "area", "iscrowd")
    truth = {name: _pad([reference[name] for reference in references]) for name in fields}
    truth["image_id"] = torch.stack([reference["image_id"] for reference in references])
    return {name: _pad([image[name] for image in detections]) for name in ("boxes", "labels", "scores")}, truth


def _pad(rows: Sequence[Tensor]) -> Tensor:
    """`(batch_size, num_rows, ...)`, at least one row wide, since not every backend gathers empty tensors."""
    least = rows[0].new_zeros(1, *rows[0].shape[1:])
    return pad_sequence([*rows, least], batch_first=True, padding_value=PADDING)[:-1]


def _unpad(batch: Mapping[str, Tensor | np.ndarray], image_ids: np.ndarray) -> list[dict[str, Any]]:
    """One dict of arrays per image, without padding."""
    fields = {name: torch.as_tensor(value).cpu().numpy() for name, value in batch.items() if name != "image_id"}
    keep = fields["labels"] != PADDING
    return [
        {"image_id": int(image_id), **{name: value[i][keep[i]] for name, value in fields.items()}}
        for i, image_id in enumerate(image_ids)
    ]


class CocoEvaluator:
    """`compute_metrics` of a `Trainer` with `batch_eval_metrics=True`: takes batches, gives figures after the last.

    `batch_eval_metrics=True` is what streams; without it `Trainer` keeps all padded batches and calls once at the end.
    `eval_use_gather_object` and `eval_do_concat_batches` have to stay at their defaults. With several processes the
    first one keeps the detections and computes; all get the same figures, since each chooses the best checkpoint.

    Args:
        id2label (`dict[int, str]`): the model's classes, as in its config.

    Attributes:
        precision (`dict[str, dict[str, list[float]]]`): that of [`CocoBoxMetric`] at the last computation; it stays
            until the next one, on the process that computes. Elsewhere, and before, it is empty.

    Example:

    ```python
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        ...
        detections = detections_from_predictions(predictions, torch.stack([x["orig_size"] for x in labels]))
        return loss, *gatherable(detections, references_from_labels(labels))
    ```
    """

    def __init__(self, id2label: Mapping[int, str]):
        self.id2label = dict(id2label)
        self.metric: CocoBoxMetric | None = None
        self.precision: Curves = {}

    def reset(self) -> None:
        """Forgets what an evaluation that broke off has left behind."""
        if self.metric is not None:
            self.metric.close()
        self.metric = None

    def __call__(self, evaluation: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Adds a batch, the same in every process; with `compute_result`, the figures of all batches.

        Raises:
            ValueError: the predictions are not what [`gatherable`] makes.
        """
        if not isinstance(evaluation.predictions, Mapping) or not isinstance(evaluation.label_ids, Mapping):
            raise ValueError(
                "predictions and labels must be the padded tensors of `gatherable`, got "
                f"{type(evaluation.predictions).__name__} and {type(evaluation.label_ids).__name__}: return them from "
                "`prediction_step` and leave `eval_use_gather_object` off"
            )
        several = dist.is_available() and dist.is_initialized()
        main = not several or dist.get_rank() == 0
        figures: list[dict[str, float] | None] = [None]
        if main:
            self.metric = CocoBoxMetric(self.id2label) if self.metric is None else self.metric
            image_ids = torch.as_tensor(evaluation.label_ids["image_id"]).cpu().numpy()
            self.metric.add_batch(
                predictions=_unpad(evaluation.predictions, image_ids),
                references=_unpad(evaluation.label_ids, image_ids),
            )
            if compute_result:
                figures[0] = self.metric.compute()
                self.precision = self.metric.precision
                self.reset()
        if several and compute_result:
            dist.broadcast_object_list(figures, src=0)
        return figures[0] or {}


class CocoBoxMetric(evaluate.Metric):
    """COCO's box figures as an `evaluate.Metric`, computed by faster-coco-eval, without network.

    Batches wait in an Arrow file in a temporary folder of this object, so concurrent runs never meet and nothing but
    that file grows. An image id counts once, however often it was added: the last entry stays.

    Args:
        id2label (`dict[int, str]`): classes by the number that `labels` use. Other numbers are an error.

    `compute()` gives `map`, `map_50`, `map_75`, `map_small|medium|large`, `mar_1|10|100`, `mar_small|medium|large` and
    `map_<class name>`, with the class's number behind a name that another class or a figure has: `map_small_3`. A
    figure for which there is no ground-truth box is -1, as in the official evaluator, and enters no mean.

    Attributes:
        precision (`dict[str, dict[str, list[float]]]`): after `compute()`, at IoU `50` and `75` percent and by class,
            precision in [0, 1] at the 101 recalls 0, 0.01, ..., 1, for boxes of all areas and 100 detections an image.
            Names that several classes have are followed by the class's number: `cat_3`. Classes without a
            ground-truth box are left out.

    Example:

    ```python
    >>> metric = CocoBoxMetric({0: "cat"})
    >>> metric.add_batch(
    ...     predictions=[{"image_id": 7, "boxes": [[0, 0, 50, 50]], "scores": [0.9], "labels": [0]}],
    ...     references=[{"image_id": 7, "boxes": [[0, 0, 50, 50]], "labels": [0], "area": [2500], "iscrowd": [0]}],
    ... )
    >>> round(metric.compute()["map"], 3)
    1.0
    ```
    """

    def __init__(self, id2label: Mapping[int, str]):
        self.id2label = dict(id2label)
        folder = tempfile.mkdtemp(prefix="coco-box-metric-")
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.precision: Curves = {}
        super().__init__(cache_dir=folder, seed=0)

    def close(self) -> None:
        """Removes the temporary folder, which else goes with the object; nothing can be added any more."""
        self._remove()

    def _info(self) -> evaluate.MetricInfo:
        number, real = datasets.Value("int64"), datasets.Value("float64")
        image = {
            "image_id": number,
            "boxes": datasets.List(datasets.List(real, length=4)),
            "labels": datasets.List(number),
        }
        predictions = {**image, "scores": datasets.List(real)}
        references = {**image, "area": datasets.List(real), "iscrowd": datasets.List(number)}
        return evaluate.MetricInfo(
            description="Average precision and recall of boxes as COCO defines them.",
            citation="T.-Y. Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014, arXiv:1405.0312",
            inputs_description="\nOne dict per image; boxes are (x_min, y_min, x_max, y_max) in pixels.\n",
            features=datasets.Features({"predictions": predictions, "references": references}),
        )

    def _compute(self, predictions: list[dict], references: list[dict]) -> dict[str, float]:
        images = {r["image_id"]: (p, r) for p, r in zip(predictions, references, strict=True)}
        truth, answers = [], []
        for image_id, (prediction, reference) in images.items():
            if prediction["image_id"] != image_id:
                raise ValueError(
                    f"prediction and reference must be of one image, got {prediction['image_id']}, {image_id}"
                )
            truth += _annotations(reference, area=reference["area"], iscrowd=reference["iscrowd"])
            answers += _annotations(prediction, score=prediction["scores"])
        unknown = sorted({box["category_id"] for box in truth + answers} - self.id2label.keys())
        if unknown:
            raise ValueError(f"labels must be among the {len(self.id2label)} of id2label, got {unknown[:10]}")
        twisted = [box["bbox"] for box in truth if min(box["bbox"][2:]) < 0]
        if twisted:
            raise ValueError(
                f"boxes must be (x_min, y_min, x_max, y_max), got widths or heights below 0: {twisted[:10]}"
            )
        figures, self.precision = _figures(list(images), self.id2label, truth, answers)
        return figures


def _annotations(image: Mapping[str, Any], **columns: list[float]) -> list[dict[str, Any]]:
    """One image's boxes in COCO's words."""
    return [
        {
            "image_id": image["image_id"],
            "category_id": label,
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top),
            **dict(zip(columns, values, strict=True)),
        }
        for label, (left, top, right, bottom), *values in zip(
            image["labels"], image["boxes"], *columns.values(), strict=True
        )
    ]


def _figures(
    image_ids: list[int], id2label: dict[int, str], truth: list[dict], answers: list[dict]
) -> tuple[dict[str, float], Curves]:
    """Runs the COCO library, whose order of figures is that of `FIGURES`; the curves are the metric's `precision`."""
    frame = {
        "images": [{"id": image_id} for image_id in image_ids],
        "categories": [{"id": number, "name": name} for number, name in id2label.items()],
    }
    for boxes in (truth, answers):
        for number, box in enumerate(boxes, start=1):  # 0 means "unmatched" to the library
            box["id"] = number
    evaluator = COCOeval_faster(*(COCO({**frame, "annotations": boxes}) for boxes in (truth, answers)), iouType="bbox")
    evaluator.run()
    figures = dict(zip(FIGURES, (float(value) for value in evaluator.stats), strict=True))
    precision = evaluator.eval["precision"][..., 0, -1]  # (thresholds, recalls, classes): all areas, 100 detections
    curves: Curves = {percent: {} for percent in CURVE_THRESHOLDS}
    shared = Counter(id2label.values())
    for i, (number, key) in enumerate(class_figures(id2label).items()):
        name = id2label[number] if shared[id2label[number]] == 1 else f"{id2label[number]}_{number}"
        known = precision[..., i][precision[..., i] > -1]
        figures[key] = float(known.mean()) if known.size else -1.0
        for percent, threshold in CURVE_THRESHOLDS.items():
            if known.size:
                curves[percent][name] = precision[threshold, :, i].tolist()
    return figures, curves


def class_figures(id2label: Mapping[int, str]) -> dict[int, str]:
    """What the figure of each class is called, by its number: see [`CocoBoxMetric`]."""
    taken = Counter(FIGURES) + Counter(f"map_{name}" for name in id2label.values())
    return {
        number: f"map_{name}" if taken[f"map_{name}"] == 1 else f"map_{name}_{number}"
        for number, name in sorted(id2label.items())
    }
