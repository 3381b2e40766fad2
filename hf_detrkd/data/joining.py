"""Gives two splits the same classes, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .detection import DetectionDataset
from .errors import DatasetError
from .records import ImageRecord, Records, labeled_of


class RenumberedRecords(Records):
    """The records of another list, with other numbers for the classes.

    Args:
        records (`Records` or `Sequence[ImageRecord]`)
        numbers (`numpy.ndarray` of shape `(num_classes,)`): the new number of each class.
    """

    def __init__(self, records: Records | Sequence[ImageRecord], numbers: np.ndarray) -> None:
        self.records, self.numbers = records, numbers

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> ImageRecord:
        record = self.records[index]
        return replace(record, categories=self.numbers[record.categories])

    def labeled(self) -> np.ndarray:
        return labeled_of(self.records)


def with_common_classes(
    train: DetectionDataset, evaluation: DetectionDataset, names: tuple[str, str]
) -> tuple[DetectionDataset, DetectionDataset, str | None]:
    """Both data sets with the classes of both: those of the training set, then further ones.

    Args:
        train, evaluation ([`DetectionDataset`])
        names (`tuple[str, str]`): of the splits, in messages.

    Returns:
        `tuple`: the two data sets, and a table of the classes as text if they had to be joined.

    Raises:
        `DatasetError`: they have no class in common, or a name occurs twice in one of them.
    """
    if (train.classes, train.category_ids) == (evaluation.classes, evaluation.category_ids):
        return train, evaluation, None
    for data, name in zip((train, evaluation), names, strict=True):
        if len(set(data.classes)) < len(data.classes):
            twice = sorted({one for one in data.classes if data.classes.count(one) > 1})
            raise DatasetError(f"The split {name} has the class name {twice[0]!r} twice, so classes cannot be joined.")
    if not set(train.classes) & set(evaluation.classes):
        raise DatasetError(
            f"The splits {names[0]} and {names[1]} have no class in common: {train.classes[:10]} and "
            f"{evaluation.classes[:10]}."
        )
    classes = list(dict.fromkeys([*train.classes, *evaluation.classes]))
    ids = dict(zip(train.classes, train.category_ids, strict=True))
    for name, number in zip(evaluation.classes, evaluation.category_ids, strict=True):
        ids.setdefault(name, number)
    if len(set(ids.values())) < len(ids):  # one number for two names
        ids = {name: place for place, name in enumerate(classes)}
    first, second = (renumbered(data, classes, [ids[name] for name in classes]) for data in (train, evaluation))
    return first, second, joined_table(train, evaluation, names)


def renumbered(data: DetectionDataset, classes: list[str], category_ids: list[int]) -> DetectionDataset:
    """A data set with these classes, which contain its own."""
    numbers = np.array([classes.index(name) for name in data.classes], dtype=np.int64)
    found = data.with_records(RenumberedRecords(data.records, numbers))
    found.classes, found.category_ids = classes, category_ids
    return found


def joined_table(train: DetectionDataset, evaluation: DetectionDataset, names: tuple[str, str]) -> str:
    """The category id of every class in both splits, as text."""
    sides = [dict(zip(data.classes, data.category_ids, strict=True)) for data in (train, evaluation)]
    classes = dict.fromkeys([*sides[0], *sides[1]])
    width = max(len("class"), *map(len, classes)) + 2
    lines = [f"{'class':{width}}{names[0]:>12}{names[1]:>12}"]
    lines += [f"{name:{width}}{sides[0].get(name, '-'):>12}{sides[1].get(name, '-'):>12}" for name in classes]
    return "\n".join(lines)
