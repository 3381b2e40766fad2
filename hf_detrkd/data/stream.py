"""Training data as a stream of rows, read in endless passes by the loaders of all processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import datasets
from packaging.version import Version
from torch.utils.data import IterableDataset, get_worker_info

from .errors import DatasetError
from .records import RepairedBoxes


logger = logging.getLogger(__name__)

AT_ONCE = 16  # rows that are taken from the `datasets` library together
PROGRESS = "progress"  # its key in a batch
SINCE = "4.8"  # version of datasets
MANY = 10  # shards of each reader: one more or less makes little difference

Item = dict[str, Any]


class Progress(NamedTuple):
    """How far a reader has come, and what it has found.

    Attributes:
        reader (`int`): its number among the readers of all processes.
        passes (`int`): whole passes over its share.
        rows (`int`): rows of its share in the current pass.
        images, unreadable (`int`): of all passes, images that were read and that could not be read.
        boxes, dropped, clipped (`int`): of all passes, see [`RepairedBoxes`].
    """

    reader: int
    passes: int = 0
    rows: int = 0
    images: int = 0
    unreadable: int = 0
    boxes: int = 0
    dropped: int = 0
    clipped: int = 0

    def after(self, item: Item | None, found: RepairedBoxes | None) -> Progress:
        """The progress with one more row."""
        read = item is not None
        counted = self._replace(rows=self.rows + 1, images=self.images + read, unreadable=self.unreadable + (not read))
        if found is None:
            return counted
        boxes, dropped, clipped = self.boxes + found.boxes, self.dropped + found.dropped, self.clipped + found.clipped
        return counted._replace(boxes=boxes, dropped=dropped, clipped=clipped)


def streams_work() -> bool:
    """True if the installed `datasets` can stream as this package needs it."""
    return Version(datasets.__version__) >= Version(SINCE)


class RowStream(IterableDataset):
    """Training items from a stream of the `datasets` library, pass after pass without an end.

    The workers of the loaders of all processes share the rows of a pass, see [`Reading`].

    Args:
        rows (`datasets.IterableDataset`): whose rows are training items, dicts of `pixel_values` and `labels`. Its
            `set_epoch` is called with the number of the pass, so that a shuffle of its own changes.
        name (`str`, *optional*, defaults to `"the stream"`): in messages.

    Raises:
        `DatasetError`: the installed `datasets` is too old.

    Attributes:
        num_rows (`int`, *optional*): rows of a pass, where known.
        most (`int`, *optional*): rows of a pass that are used, from the first one.
        seed (`int`), shuffle_buffer_size (`int`, *optional*): of the shuffle, which has a new order in every pass.
    """

    def __init__(self, rows: datasets.IterableDataset, name: str = "the stream") -> None:
        if not streams_work():
            raise DatasetError(
                f"Streams need datasets>={SINCE}, but {datasets.__version__} is installed: upgrade datasets, or leave "
                "out --streaming."
            )
        self.rows, self.name = rows, name
        self.num_rows: int | None = None
        self.most: int | None = None
        self.seed = 0
        self.shuffle_buffer_size: int | None = None

    def __iter__(self) -> Iterator[Item]:
        """All items, shared among the workers of a loader, without an end."""
        info = get_worker_info()
        readers = 1 if info is None else info.num_workers
        for _, item in Reading(self, [Progress(reader) for reader in range(readers)], readers):
            yield item

    def batches_of(self, rows: datasets.IterableDataset) -> Iterator[dict[str, list[Any]]]:
        """The rows in order, some at once: unlike an iteration row by row, this does not split them among workers."""
        return rows.iter(AT_ONCE)

    def read(self, row: dict[str, Any], number: int, epoch: int) -> tuple[Item | None, RepairedBoxes | None]:
        """The item of a row, or `None` if it has to be skipped, and the counts of its boxes.

        Args:
            row (`dict`)
            number (`int`): of the row, unique in a pass.
            epoch (`int`): number of the pass.
        """
        return row, None


class Reading(IterableDataset):
    """What the loader of one process reads of a stream: pairs of a reader's [`Progress`] and an item.

    Every worker is a reader; without workers the process is one. A pass is shared among all readers: by shards (files,
    or the row groups of Parquet) if each gets the same number of them or at least [`MANY`]; otherwise every reader
    reads all rows and keeps each n-th. In the next pass it has another share. A reader does not wait for others at
    the end of its share. What it reads depends only on the seed, the pass, its share and the number of readers, so
    that it can go on where it was: the rows before are read again, but their images are not decoded.

    Args:
        stream ([`RowStream`])
        starts (`Sequence[Progress]`): the readers of this process, in the order in which they deliver a batch.
        readers (`int`): those of all processes.
    """

    def __init__(self, stream: RowStream, starts: Sequence[Progress], readers: int) -> None:
        self.stream, self.starts, self.readers = stream, list(starts), readers
        rows, few = stream.rows, MANY * readers
        if rows.num_shards % readers and rows.num_shards < few and stream.most is None:
            rows = rows.reshard()
        even = rows.num_shards % readers == 0 or rows.num_shards >= few
        self.by_shards = even and stream.most is None
        if not self.by_shards and stream.most is None:
            logger.warning(
                "%s has %d shards, which %d readers (processes x --dataloader_num_workers) cannot share evenly: each "
                "reads all rows and keeps its share. Write it in a multiple of %d files to read every row once.",
                *(stream.name, rows.num_shards, readers, readers),
            )
        self.rows = rows if stream.most is None else rows.take(stream.most)
        if stream.shuffle_buffer_size is not None:
            self.rows = self.rows.shuffle(seed=stream.seed, buffer_size=stream.shuffle_buffer_size)

    def __iter__(self) -> Iterator[tuple[Progress, Item]]:
        info = get_worker_info()
        progress = self.starts[0 if info is None else info.id]
        while True:
            start, epoch = progress, progress.passes
            share = (progress.reader + epoch) % self.readers
            for place, row in enumerate(self._rows_of(share, epoch)):
                if place < start.rows:
                    continue
                item, found = self.stream.read(row, place * self.readers + share, epoch)
                progress = progress.after(item, found)
                if item is not None:
                    yield progress, item
            if progress.images == start.images and not start.rows:
                raise DatasetError(self._nothing(progress, share))
            progress = progress._replace(passes=epoch + 1, rows=0)

    def _rows_of(self, share: int, epoch: int) -> Iterator[dict[str, Any]]:
        """The rows of one share of a pass, in order."""
        parts = (self.readers, share) if self.by_shards else (1, 0)
        part = self.rows.shard(*parts)  # always a copy, whose epoch is its own
        part.set_epoch(epoch)
        batches = self.stream.batches_of(part)
        rows = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
        return rows if self.by_shards else islice(rows, share, None, self.readers)

    def _nothing(self, progress: Progress, share: int) -> str:
        if progress.rows:
            return f"None of {progress.rows} images of {self.stream.name} in share {share} can be read."
        return (
            f"{self.stream.name} has no rows for reader {progress.reader} of {self.readers}: give it more rows, or "
            "set a lower --dataloader_num_workers."
        )


class Stamped:
    """Collates the pairs of a [`Reading`]: the batch also holds the reader's progress, as `progress`.

    Args:
        collate: makes a batch of items.
    """

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, pairs: Sequence[tuple[Progress, Item]]) -> dict[str, Any]:
        progress, _ = pairs[-1]
        return {**self.collate([item for _, item in pairs]), PROGRESS: tuple(progress)}
