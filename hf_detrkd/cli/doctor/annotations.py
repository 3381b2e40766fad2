"""Statistics of annotations, faults found by their repairs on loading, and the splits of a data set."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ...data import DetectionDataset, datasets
from ...data.faults import relative_fault


@dataclass(frozen=True)
class Statistics:
    """Statistics of the annotations of a split.

    Attributes:
        images, boxes, empty, crowds (`int`): `empty` are images without a box, `crowds` crowd regions.
        classes (`dict[str, int]`): boxes of each class.
        sides (`tuple[float, float, float]`): square root of a box's area in pixels of its image: 10th percentile,
            median, 90th.
        per_image (`tuple[float, int]`): median and maximum number of boxes per image.
        reach (`tuple[float, float]`): the largest right and lower edges of all boxes, as fractions of the image.
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
        reach = np.fmax.reduce(ends / frames, axis=0, initial=0.0)  # ignores unknown sizes
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
        """The reason why the boxes cannot be in pixels of their images, or `None`."""
        return relative_fault(self.furthest)


def offered_splits(
    dataset_name: str, train: str | None, evaluation: str | None, config_name: str | None = None
) -> tuple[list[str], str | None, str | None]:
    """The splits of a data set, and the two of them that a run most likely means, or `None`.

    Args:
        dataset_name (`str`): see [`~hf_detrkd.data.load_detection_splits`].
        train, evaluation (`str`, *optional*): the requested names.
        config_name (`str`, *optional*): the configuration of a data set of the Hub.
    """
    names = datasets.split_names(dataset_name, config_name)
    chosen = _nearest(names, [*([train] if train else []), *datasets.TRAIN_SPLITS])
    others = [name for name in names if name != chosen]
    return names, chosen, _nearest(others, [*([evaluation] if evaluation else []), *datasets.EVAL_SPLITS])


def _nearest(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first name that equals, starts with or resembles a wanted one."""
    for want in wanted:
        alike = [name for name in names if name.lower().startswith(want.lower())]
        near = [name for name in names if name == want] or alike or difflib.get_close_matches(want, names, 1)
        if near:
            return near[0]
    return None
