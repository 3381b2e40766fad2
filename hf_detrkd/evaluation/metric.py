"""COCO box AP as an `evaluate.Metric`, streamed through an Arrow file."""

from __future__ import annotations

import shutil
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import datasets
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from .figures import CURVE_THRESHOLDS, FIGURES, Curves, class_figures


@contextmanager
def _without_scripts_of_that_name() -> Iterator[None]:
    """Makes `import evaluate` find the library even if an `evaluate.py` lies beside the script that runs."""
    path = sys.path[:]
    sys.path[:] = [folder for folder in path if not Path(folder, "evaluate.py").is_file()]
    try:
        yield
    finally:
        sys.path[:] = path


with _without_scripts_of_that_name():
    import evaluate


class CocoBoxMetric(evaluate.Metric):
    """COCO box metrics as an `evaluate.Metric`, computed by faster-coco-eval, without network access.

    Batches are stored in an Arrow file in a temporary folder of this object, so concurrent runs do not collide and
    memory use does not grow. An image id counts once, however often it was added: the last entry is used.

    Args:
        id2label (`dict[int, str]`): class names by the numbers in `labels`. Other numbers are an error.

    `compute()` gives `map`, `map_50`, `map_75`, `map_small|medium|large`, `mar_1|10|100`, `mar_small|medium|large` and
    `map_<class name>`, with the class's number after a name that another class or metric has: `map_small_3`. A
    metric without ground-truth boxes is -1, as in the official evaluator, and is not part of any mean.

    Attributes:
        precision (`dict[str, dict[str, list[float]]]`): after `compute()`, at IoU `50` and `75` percent and by class,
            precision in [0, 1] at the 101 recalls 0, 0.01, ..., 1, for boxes of all areas and 100 detections per
            image. Names that several classes have are followed by the class's number: `cat_3`. Classes without
            ground-truth boxes are omitted.

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
        """Removes the temporary folder, which otherwise goes with the object; nothing can be added afterwards."""
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
        for place, (image_id, (prediction, reference)) in enumerate(sorted(images.items(), key=itemgetter(0))):
            if prediction["image_id"] != image_id:
                raise ValueError(
                    f"prediction and reference must be of one image, got {prediction['image_id']}, {image_id}"
                )
            # The COCO library keeps ids in doubles, in which large ones are equal: it gets the images' numbers.
            truth += _annotations(reference, place, area=reference["area"], iscrowd=reference["iscrowd"])
            answers += _annotations(prediction, place, score=prediction["scores"])
        unknown = sorted({box["category_id"] for box in truth + answers} - self.id2label.keys())
        if unknown:
            raise ValueError(f"labels must be among the {len(self.id2label)} of id2label, got {unknown[:10]}")
        twisted = [box["bbox"] for box in truth if min(box["bbox"][2:]) < 0]
        if twisted:
            raise ValueError(
                f"boxes must be (x_min, y_min, x_max, y_max), got widths or heights below 0: {twisted[:10]}"
            )
        figures, self.precision = _figures(list(range(len(images))), self.id2label, truth, answers)
        return figures


def _annotations(image: Mapping[str, Any], number: int, **columns: list[float]) -> list[dict[str, Any]]:
    """One image's boxes as COCO annotations."""
    return [
        {
            "image_id": number,
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
    """Runs the COCO library, whose metrics have the order of `FIGURES`; the curves are the metric's `precision`."""
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
