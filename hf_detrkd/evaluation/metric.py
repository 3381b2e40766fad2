"""COCO box AP as an `evaluate.Metric` that keeps boxes as arrays in files."""

from __future__ import annotations

import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .box_rows import FOUND, TRUTH, RowFile, rows_of
from .coco_evaluation import evaluate_boxes
from .figures import Curves


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

    Boxes are stored in files in a temporary folder of this object, so concurrent runs do not collide and memory use
    does not grow with the batches; `compute()` takes 56 bytes for each box, and what one class needs. An image id
    counts once, however often it was added: the last entry is used.

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
        self._image_ids: list[int] = []
        self.precision: Curves = {}
        super().__init__(cache_dir=folder, seed=0)
        self._found = RowFile(Path(self.data_dir, "found"), FOUND)
        self._truth = RowFile(Path(self.data_dir, "truth"), TRUTH)

    def close(self) -> None:
        """Removes the temporary folder, which otherwise goes with the object; nothing can be added afterwards."""
        self._remove()

    def _info(self) -> evaluate.MetricInfo:
        number, real = datasets.Value("int64"), datasets.Value("float64")
        image = {
            "image_id": number,
            "boxes": datasets.Sequence(datasets.Sequence(real, length=4)),
            "labels": datasets.Sequence(number),
        }
        predictions = {**image, "scores": datasets.Sequence(real)}
        references = {**image, "area": datasets.Sequence(real), "iscrowd": datasets.Sequence(number)}
        return evaluate.MetricInfo(
            description="Average precision and recall of boxes as COCO defines them.",
            citation="T.-Y. Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014, arXiv:1405.0312",
            inputs_description="\nOne dict per image; boxes are (x_min, y_min, x_max, y_max) in pixels.\n",
            features=datasets.Features({"predictions": predictions, "references": references}),
        )

    def __len__(self) -> int:
        """The number of images that were added since the last `compute`."""
        return len(self._image_ids)

    def add(self, *, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        """Adds an image."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]) -> None:
        """Adds images, whose values may be lists, arrays or tensors.

        Raises:
            ValueError: they are not in the form of the class's example, a label is not in `id2label`, or a
                ground-truth box ends before it begins.
        """
        image_ids = [int(reference["image_id"]) for reference in references]
        others = [int(prediction["image_id"]) for prediction in predictions]
        if image_ids != others:
            raise ValueError(
                f"predictions and references must be of the same images, got {others[:10]} and {image_ids[:10]}"
            )
        start = len(self)
        found, truth = (
            np.concatenate([np.empty(0, kind), *(rows_of(one, n, kind) for n, one in enumerate(images, start))])
            for images, kind in ((predictions, FOUND), (references, TRUTH))
        )
        self._check(found, truth)
        self._found.append(found)
        self._truth.append(truth)
        self._image_ids += image_ids

    def _check(self, found: np.ndarray, truth: np.ndarray) -> None:
        unknown = sorted(set(found["label"].tolist() + truth["label"].tolist()) - self.id2label.keys())
        if unknown:
            raise ValueError(f"labels must be among the {len(self.id2label)} of id2label, got {unknown[:10]}")
        twisted = truth["box"][(truth["box"][:, 2:] < 0).any(1)]
        if len(twisted):
            raise ValueError(
                "boxes must be (x_min, y_min, x_max, y_max), got widths or heights below 0: "
                f"{twisted[:10].tolist()} (x, y, width, height)"
            )

    def compute(
        self,
        *,
        predictions: Sequence[Mapping[str, Any]] | None = None,
        references: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, float]:
        """The metrics of all images that were added, and of those given here; then there are none.

        Raises:
            ValueError: there are no images; for the errors of images given here see `add_batch`.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions or [], references=references or [])
        if not self._image_ids:
            raise ValueError("there are no images to compute metrics of: call `add` or `add_batch` first")
        ids = np.array(self._image_ids)
        _, last = np.unique(ids[::-1], return_index=True)
        place = np.full(len(ids), -1)
        place[len(ids) - 1 - last] = np.arange(len(last))
        truth, found = (_placed(file.read(), place) for file in (self._truth, self._found))
        figures, self.precision = evaluate_boxes(truth, found, self.id2label)
        self._found.clear()
        self._truth.clear()
        self._image_ids = []
        return figures


def _placed(rows: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The rows with their images' places instead of numbers, without those of images that have none."""
    rows["image"] = place[rows["image"]]
    return rows if (place >= 0).all() else rows[rows["image"] >= 0]
