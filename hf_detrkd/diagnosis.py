"""What is wrong with a data set and a teacher, before a run: found in the boxes alone, and in the teacher's answers.

A teacher that knows its trade is a witness: where its boxes fit the truth only once that is moved, the truth is in
another frame; where its names fit only once they are exchanged, the classes are in another order; where it sees better
through another preprocessing, its image processor is wrong. Each check asks for far better, not for better.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.utils.data import DataLoader
from torchvision.ops import box_iou, nms
from tqdm import tqdm

from .data import DetectionCollator, DetectionDataset, DetectionTransform, checks, datasets
from .evaluation import CocoBoxMetric, class_figures
from .teacher import NO_NORMALIZATION, Normalization, Teacher
from .teacher_check import detections_of


Columns = Sequence[int | None]
"""For each class of the data set the teacher's, as in [`ClassMap`]."""

LEAST_BOXES = 10  # fewer prove nothing
IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES: Normalization = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BYTES: Normalization = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
NORMALIZATIONS = {
    "no normalisation": NO_NORMALIZATION,
    "ImageNet's mean and standard deviation": IMAGENET,
    "mean and standard deviation 0.5": HALVES,
    "pixels of 0 to 255 (do_rescale false)": BYTES,
}


@dataclass(frozen=True)
class Statistics:
    """What is annotated in a split.

    Attributes:
        images, boxes, empty, crowds (`int`): `empty` are images without a box, `crowds` regions of groups.
        classes (`dict[str, int]`): boxes of each class.
        sides (`tuple[float, float, float]`): square root of a box's area in pixels of its image: tenth percentile,
            median, ninetieth.
        per_image (`tuple[float, int]`): median and most boxes of an image.
        reach (`tuple[float, float]`): the right and lower edges that no box crosses, as fractions of the image.
        furthest (`float`): largest coordinate of a box in pixels; 0 without boxes.
    """

    images: int
    boxes: int
    empty: int
    crowds: int
    classes: dict[str, int]
    sides: tuple[float, float, float]
    per_image: tuple[float, int]
    reach: tuple[float, float]
    furthest: float

    @classmethod
    def of(cls, dataset: DetectionDataset, name: str) -> Statistics:
        records = list(tqdm(dataset.records, desc=f"Reading the annotations of {name}", leave=False))
        boxes = np.concatenate([record.boxes for record in records]).reshape(-1, 4)
        sizes = [(r.width or np.nan, r.height or np.nan) for r in records for _ in r.boxes]
        ends, frames = boxes[:, :2] + boxes[:, 2:], np.array(sizes, dtype=float).reshape(-1, 2)
        reach = np.fmax.reduce(ends / frames, axis=0, initial=0.0)  # sizes that are not known are left out
        kinds = np.bincount(np.concatenate([r.categories for r in records]), minlength=len(dataset.classes))
        counts = [len(record.boxes) for record in records]
        sides = np.sqrt(boxes[:, 2] * boxes[:, 3])
        low, middle, high = np.percentile(sides, (10, 50, 90)) if len(sides) else (0.0, 0.0, 0.0)
        return cls(
            images=len(records),
            boxes=len(boxes),
            empty=counts.count(0),
            crowds=int(sum(record.iscrowd.sum() for record in records)),
            classes=dict(zip(dataset.classes, kinds.tolist(), strict=True)),
            sides=(float(low), float(middle), float(high)),
            per_image=(float(np.median(counts)), max(counts)),
            reach=(float(reach[0]), float(reach[1])),
            furthest=float(ends.max()) if len(ends) else 0.0,
        )

    def fault(self) -> str | None:
        """Why the boxes cannot be in pixels of their images; `None` where nothing says so."""
        if not self.boxes or self.furthest > 1.5:
            return None
        return (
            f"no coordinate is above {self.furthest:.3g}, so the boxes look divided by the image's width and height: "
            "multiply them, since x, y, width, height in pixels are asked"
        )


@dataclass(frozen=True)
class Mended:
    """Boxes of a split that were dropped or clipped when it was read."""

    source: str
    boxes: int
    dropped: int
    clipped: int

    def fault(self) -> str | None:
        """Why the boxes cannot be in the frame of their images; `None` where nothing says so."""
        outside = self.dropped + self.clipped
        if outside <= self.boxes / 2:
            return None
        return (
            f"{outside} of {self.boxes} boxes of {self.source} reach out of their image or lie outside: they look "
            "like x_min, y_min, x_max, y_max, or like boxes of larger images, and x, y, width, height in pixels of "
            "the image files are asked"
        )


def offered_splits(dataset_name: str, train: str, evaluation: str | None) -> tuple[list[str], str | None, str | None]:
    """The splits that a data set has, and those of them that a run most likely means by its two; `None` for none.

    Args:
        dataset_name (`str`): see [`~hf_detrkd.data.load_detection_splits`].
        train, evaluation (`str`): as they were asked.
    """
    names = datasets.split_names(dataset_name)
    chosen = _nearest(names, [train, "train"])
    others = [name for name in names if name != chosen]
    return names, chosen, _nearest(others, [*([evaluation] if evaluation else []), *datasets.EVAL_SPLITS])


def _nearest(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first name that is wanted, begins like it, or is written much like it."""
    for want in wanted:
        alike = [name for name in names if name.lower().startswith(want.lower())]
        near = [name for name in names if name == want] or alike or difflib.get_close_matches(want, names, 1)
        if near:
            return near[0]
    return None


@contextmanager
def mended_boxes() -> Iterator[list[Mended]]:
    """Collects what is mended while data sets are read inside, one entry for each split with such boxes."""
    found: list[Mended] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(record.args, tuple) and len(record.args) == 4:
                found.append(Mended(*cast(Any, record.args)))

    listener = Listener()
    checks.logger.addHandler(listener)
    try:
        yield found
    finally:
        checks.logger.removeHandler(listener)


# --- the teacher as a witness ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """How a teacher is shown images: a size as [`DetectionTransform`] takes it, and the normalisation of pixels."""

    size: tuple[int, int] | Mapping[str, int]
    normalization: Normalization


@dataclass(frozen=True)
class Seen:
    """One image: what is annotated and what the teacher found, best first; boxes are corners in pixels.

    Attributes:
        image_id (`int`)
        size (`tuple[int, int]`): height and width of the original image.
        truth (`numpy.ndarray` of shape `(num_boxes, 4)`): without crowd regions.
        labels (`numpy.ndarray` of shape `(num_boxes,)`): the data set's classes.
        boxes (`numpy.ndarray` of shape `(num_detections, 4)`)
        named (`numpy.ndarray` of shape `(num_detections,)`): the teacher's own classes.
        scores (`numpy.ndarray` of shape `(num_detections,)`)
    """

    image_id: int
    size: tuple[int, int]
    truth: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    named: np.ndarray
    scores: np.ndarray

    def best(self) -> np.ndarray:
        """As many boxes as there are objects, the best of all classes, without repetitions, `(num_boxes, 4)`."""
        kept = nms(torch.from_numpy(self.boxes).float(), torch.from_numpy(self.scores).float(), 0.7)
        return self.boxes[kept[: len(self.truth)].numpy()]


def look(teacher: Teacher, dataset: DetectionDataset, view: View, batch_size: int) -> list[Seen]:
    """What a teacher finds in the images of a data set through a view.

    Args:
        teacher ([`Teacher`]): with its own classes, and without a normalisation of its own.
        dataset ([`DetectionDataset`])
        view ([`View`])
        batch_size (`int`): images at a time.
    """
    shown = dataset.with_transform(DetectionTransform(view.size, *view.normalization))
    found: list[Seen] = []
    for batch in DataLoader(shown, batch_size, collate_fn=DetectionCollator()):
        sizes = [tuple(label["orig_size"].tolist()) for label in batch["labels"]]
        device = teacher.model.device
        tensors = {name: v.to(device) for name, v in batch.items() if name != "labels"}
        for (answer, truth), size in zip(detections_of(teacher, batch | tensors), sizes, strict=True):
            single = truth["iscrowd"] == 0
            objects = truth["boxes"][single], truth["labels"][single]
            found.append(Seen(truth["image_id"], size, *objects, answer["boxes"], answer["labels"], answer["scores"]))
    return found


def map_of(seen: Sequence[Seen], columns: Columns, classes: Sequence[str]) -> float:
    """mAP over the classes that the teacher knows and the images show; NaN where there is none such."""
    numbers = {column: number for number, column in enumerate(columns) if column is not None}
    metric = CocoBoxMetric(dict(enumerate(classes)))
    for image in seen:
        known = [i for i, name in enumerate(image.named.tolist()) if name in numbers]
        labels = [numbers[name] for name in image.named[known].tolist()]
        answer: dict[str, Any] = {"boxes": image.boxes[known], "labels": labels, "scores": image.scores[known]}
        area = (image.truth[:, 2:] - image.truth[:, :2]).prod(1)
        truth = {"boxes": image.truth, "labels": image.labels, "area": area, "iscrowd": np.zeros(len(area), int)}
        common = {"image_id": image.image_id}
        metric.add_batch(predictions=[answer | common], references=[truth | common])
    figures = metric.compute()
    names = class_figures(dict(enumerate(classes)))
    values = [figures[names[number]] for number in numbers.values() if figures[names[number]] >= 0]
    return float(np.mean(values)) if values else float("nan")


# --- the order of the classes ----------------------------------------------------------------------------------------


def confusion(seen: Sequence[Seen], classes: int, named: int) -> np.ndarray:
    """How often an object of each class is called each of the teacher's, `(classes, named)`: by the best detection
    that overlaps it by half."""
    counts = np.zeros((classes, named), dtype=int)
    for image in seen:
        if len(image.truth) == 0:
            continue
        close = overlaps(image.truth, image.boxes) >= 0.5
        for label, row in zip(image.labels.tolist(), close, strict=True):
            if row.any():
                counts[label, image.named[row.argmax()]] += 1
    return counts


def renamed(counts: np.ndarray, columns: Columns) -> dict[int, int]:
    """Classes that the teacher plainly calls otherwise than the class map says, and what it calls them.

    Args:
        counts (`numpy.ndarray` of shape `(classes, named)`): see [`confusion`].
        columns: the class map's.

    Returns:
        `dict[int, int]`: the teacher's class for some of the data set's: those that the best one-to-one assignment
        pairs otherwise, with three objects or more, most of them called so, hardly others called so, and more than
        twice as many as by the map's name.
    """
    rows, best = linear_sum_assignment(counts, maximize=True)
    found: dict[int, int] = {}
    for row, name in zip(rows.tolist(), best.tolist(), strict=True):
        given = columns[row]
        by_name = 0 if given is None else counts[row, given]
        seen = counts[row, name]
        most = max(counts[row].sum(), counts[:, name].sum()) / 2  # a teacher may call everything one name
        if name != given and seen >= 3 and seen > most and seen > 2 * by_name:
            found[row] = name
    return found


def with_renamed(columns: Columns, found: Mapping[int, int]) -> list[int | None]:
    """The class map once the renamed classes have their partners; one whose partner was taken has none."""
    taken = set(found.values())
    return [found.get(i, None if column in taken else column) for i, column in enumerate(columns)]


# --- the frame of the boxes ------------------------------------------------------------------------------------------


Frame = Callable[[np.ndarray, tuple[int, int]], np.ndarray]
"""Corners `(num_boxes, 4)` as they were read, and (height, width) of the image, to corners in its pixels."""


def _as_read(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return corners


def _corners(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)


def _centres(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    half = (corners[:, 2:] - corners[:, :2]) / 2
    return np.concatenate([corners[:, :2] - half, corners[:, :2] + half], 1)


def _transposed(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return corners[:, [1, 0, 3, 2]]


def _relative(frame: Frame) -> Frame:
    return lambda corners, size: frame(corners, size) * _canvas(size)


def _canvas(size: tuple[int, int]) -> np.ndarray:
    return np.array([size[1], size[0], size[1], size[0]], dtype=float)


FRAMES: dict[str, Frame] = {
    "x_min, y_min, x_max, y_max": _corners,
    "centre x, centre y, width, height": _centres,
    "y, x, height, width": _transposed,
    "x, y, width, height divided by the image's": _relative(_as_read),
    "x_min, y_min, x_max, y_max divided by the image's width and height": _relative(_corners),
    "centre x, centre y, width, height divided by the image's": _relative(_centres),
}


def reframed(seen: Sequence[Seen], frame: Frame) -> list[Seen]:
    """The same images with the annotated boxes read in a frame. Those that reach the lower or right border are left
    out: what was clipped there when it was read cannot be read otherwise any more."""
    found = []
    for image in seen:
        whole = (image.truth[:, 2:] < np.array(image.size[::-1]) - 0.5).all(1)
        truth = frame(image.truth[whole], image.size)
        right = (truth[:, 2:] > truth[:, :2]).all(1)
        found.append(replace(image, truth=truth[right], labels=image.labels[whole][right]))
    return found


def agreement(seen: Sequence[Seen], frame: Frame) -> float:
    """Share of the annotated boxes that overlap one of the teacher's best by half, once read in a frame; NaN where
    there are too few."""
    total = sum(len(image.truth) for image in reframed(seen, _as_read))
    if total < LEAST_BOXES:
        return float("nan")
    pairs = zip(reframed(seen, frame), seen, strict=True)
    return sum(int((overlaps(i.truth, given.best()) >= 0.5).any(1).sum()) for i, given in pairs) / total


def better_frame(seen: Sequence[Seen]) -> tuple[str, Frame, float, float] | None:
    """The frame in which the annotated boxes fit the teacher's far better than as they were read.

    Returns:
        its words, the frame, the agreement as read and in it; `None` where there is none.
    """
    now = agreement(seen, _as_read)
    best: tuple[str, Frame, float] = "", _as_read, now
    for words, frame in [*FRAMES.items(), *_scaled(seen)]:
        found = agreement(seen, frame)
        if found > best[2] + 0.02:  # the first and simplest of equals
            best = words, frame, found
    return (*best[:2], now, best[2]) if best[2] >= 0.4 and best[2] >= now + 0.25 else None


def _scaled(seen: Sequence[Seen]) -> Iterator[tuple[str, Frame]]:
    """Frames with another scale and origin that were fitted to the teacher's boxes: in pixels, and relative to the
    images' sizes (boxes of images that were all resized to one)."""
    images = [image for image in seen if len(image.truth) and len(image.boxes)]
    if sum(len(image.truth) for image in images) < LEAST_BOXES:
        return
    for whole in (False, True):
        units = [_canvas(image.size) if whole else np.ones(4) for image in images]
        goals = [image.best() / unit for image, unit in zip(images, units, strict=True)]
        scale, shift = _fitted([image.truth for image in images], goals)

        def frame(c: np.ndarray, size: tuple[int, int], a: Any = scale, b: Any = shift, w: bool = whole) -> np.ndarray:
            return (c * np.tile(a, 2) + np.tile(b, 2)) * (_canvas(size) if w else 1.0)

        width, height = 1 / np.maximum(scale, 1e-9)
        if whole:
            yield f"boxes of images resized to about {height:.0f} x {width:.0f} pixels (height x width)", frame
        else:
            words = f"boxes of images {width:.2f} times as wide and {height:.2f} times as high"
            moved = f", moved by {-shift[0] * width:.1f} and {-shift[1] * height:.1f} pixels"
            yield words + (moved if np.abs(shift).max() > 2 else ""), frame


def _fitted(truth: list[np.ndarray], goals: list[np.ndarray], rounds: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift `(2,)` each, of x and y, that bring boxes onto others: nearest pairs, the better half of them,
    least squares, again."""
    given, wanted = np.concatenate(truth), np.concatenate(goals)
    scale = np.median(wanted[:, 2:] - wanted[:, :2], axis=0) / np.median(given[:, 2:] - given[:, :2], axis=0)
    shift = np.zeros(2)
    for _ in range(rounds):
        pairs: list[tuple[float, np.ndarray, np.ndarray]] = []
        for boxes, goal in zip(truth, goals, strict=True):
            apart = np.abs((boxes * np.tile(scale, 2) + np.tile(shift, 2))[:, None] - goal[None]).sum(-1)
            pairs += [(float(row.min()), box, goal[row.argmin()]) for row, box in zip(apart, boxes, strict=True)]
        pairs.sort(key=lambda pair: pair[0])
        near = pairs[: max(2, len(pairs) // 2)]
        start, end = (np.stack([pair[i] for pair in near]) for i in (1, 2))
        lines = [np.polyfit(start[:, axis::2].ravel(), end[:, axis::2].ravel(), 1) for axis in (0, 1)]
        scale, shift = np.array([line[0] for line in lines]), np.array([line[1] for line in lines])
    return scale, shift


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU `(num_boxes, num_others)` of corners."""
    return box_iou(torch.from_numpy(boxes).double(), torch.from_numpy(others).double()).numpy()


# --- memory ----------------------------------------------------------------------------------------------------------


def fitting_batch(peaks: Mapping[int, float], limit: float) -> int:
    """The largest batch whose memory, on the line through two measured ones, stays within a limit; 0 where none does.

    Args:
        peaks (`dict[int, float]`): GiB by batch size, two sizes or more.
        limit (`float`): GiB.
    """
    (small, low), (large, high) = min(peaks.items()), max(peaks.items())
    slope = max((high - low) / (large - small), 1e-6)
    return max(0, int(small + (limit - low) / slope))
