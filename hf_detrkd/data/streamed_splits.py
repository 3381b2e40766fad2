"""Loads a data set whose training split is streamed and whose evaluation split is kept on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from .datasets import EVAL_SPLITS, TRAIN_SPLITS, first_split, load_split
from .detection import DetectionDataset
from .detection_stream import BUFFER, DetectionStream, as_rows, content_of
from .errors import DatasetError, UnreadableImageError
from .layouts.rows import is_saved, load_errors, load_rows, load_splits
from .layouts.source import Source


SHARDS = 64  # of a stream from a data set on the disk
Streams: TypeAlias = Mapping[str, datasets.IterableDataset]


@dataclass(frozen=True)
class StreamedSplits:
    """The two sets of a training run, as [`DetectionSplits`], of which the first is a stream.

    Attributes:
        train ([`DetectionStream`])
        eval ([`DetectionDataset`])
        train_name, eval_name (`str`): the splits' names in their source.
    """

    train: DetectionStream
    eval: DetectionDataset
    train_name: str
    eval_name: str

    @property
    def all_train(self) -> DetectionStream:
        """The training set: a stream has no images without labels."""
        return self.train


def load_streamed_splits(
    dataset_name: str | Path,
    train_split: str | None = None,
    eval_split: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    skip_unreadable_images: bool = False,
    class_names: Sequence[str] | None = None,
    shuffle_buffer_size: int = BUFFER,
    config_name: str | None = None,
) -> StreamedSplits:
    """Opens the training split of a data set as a stream, and loads its evaluation split.

    Only the rows of the evaluation split are copied to the disk, into the cache of the `datasets` library.

    Args:
        dataset_name (`str` or `Path`): id of a data set on the Hub, or a folder of Parquet, Arrow or WebDataset files.
        train_split, eval_split, max_train_samples, max_eval_samples, config_name (*optional*): as in
            [`load_detection_splits`].
        class_names, skip_unreadable_images, shuffle_buffer_size (*optional*): as in [`DetectionStream`].

    Raises:
        `DatasetError`: if the data set or a split is missing or cannot be used, or the class names are not known.

    Example:
        ```python
        >>> splits = load_streamed_splits("path/to/folder", shuffle_buffer_size=2000)
        >>> transform = DetectionTransform((640, 640), augmentation=AugmentationConfig())
        >>> train = splits.train.with_transform(transform, seed=42)
        ```
    """
    name = str(dataset_name)
    if name == "shapes":
        raise DatasetError("shapes is generated image by image and cannot be streamed: leave out --streaming.")
    streams, rows_of = _opened(name, config_name)

    def load(split: str, most: int | None) -> DetectionDataset:
        return load_rows(rows_of(split, most), f"{name}, split {split}", train.named)

    source = Source(name, list(streams), load)
    train_split = train_split or first_split(source, TRAIN_SPLITS, "train")
    eval_split = eval_split or first_split(source, EVAL_SPLITS, "evaluate")
    if train_split not in streams:
        raise DatasetError(f"{name} has no split {train_split!r}: choose one of {', '.join(streams)}.")
    train = DetectionStream(
        streams[train_split],
        f"{name}, split {train_split}",
        class_names,
        skip_unreadable_images,
        shuffle_buffer_size,
        max_train_samples,
    )
    evaluation = load_split(source, eval_split, max_eval_samples, skip_unreadable_images)
    return StreamedSplits(train, evaluation, train_split, eval_split)


def _opened(name: str, config_name: str | None) -> tuple[Streams, Callable[[str, int | None], datasets.Dataset]]:
    """The splits of a data set as streams, and a function that loads at most a given number of rows of one."""
    folder = Path(name).expanduser()
    path = str(folder) if folder.exists() else name
    if is_saved(folder):
        saved = load_splits(path)
        streams = {split: rows.to_iterable_dataset(min(SHARDS, len(rows))) for split, rows in saved.items()}
        return streams, lambda split, most: saved[split].select(range(len(saved[split]))[:most])
    with load_errors(path):
        builder = datasets.load_dataset_builder(path, config_name)
        streams = dict(builder.as_streaming_dataset())

    def rows_of(split: str, most: int | None) -> datasets.Dataset:
        # The builder's folder depends on the commit of the Hub, or on names and times of the files.
        key = hashlib.sha256(f"{path}|{builder.cache_dir}|{split}|{most}".encode()).hexdigest()[:32]
        return _on_disk(as_rows(streams[split], f"{name}, split {split}"), most, key)

    return streams, rows_of


def _on_disk(rows: datasets.IterableDataset, most: int | None, key: str) -> datasets.Dataset:
    """The rows of a stream with the bytes of their images, in the cache of the `datasets` library."""
    rows = rows.cast_column("image", datasets.Image(decode=False))
    rows = rows if most is None else rows.take(most)

    def generate() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows):
            with suppress(UnreadableImageError):  # a missing file is found later
                row["image"] = {"path": row["image"]["path"], "bytes": content_of(row["image"], f"row {number}")}
            yield row

    found: datasets.Dataset = datasets.Dataset.from_generator(generate, features=rows.features, fingerprint=key)
    return found.cast_column("image", datasets.Image())
