"""Writes answers as Arrow files of the `datasets` library, each of which is complete or not there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features, Sequence, Value
from datasets.arrow_writer import ArrowWriter

from .manifest import FILE, Manifest, first_difference


class AnswerWriter:
    """A folder of answers that is being written; a stopped series goes on with the files that are missing.

    Args:
        folder (`Path`)
        manifest ([`Manifest`]): is written first.

    Raises:
        ValueError: the folder holds answers that depend on something else.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        if (folder / FILE).is_file():
            other = first_difference(vars(Manifest.read(folder)), vars(manifest), "manifest")
            if other is not None:
                raise ValueError(f"{folder} holds other answers: {other}. Choose another folder, or delete this one.")
        self.features = features_of(manifest)

    def begin(self) -> None:
        """Writes the manifest, and removes what a stopped process left; only one process calls it, before others
        write."""
        self.manifest.write(self.folder)
        for left in self.folder.glob("*.tmp"):
            left.unlink()

    def missing(self) -> list[int]:
        """Numbers of the files that are not written yet."""
        return [number for number in range(self.manifest.shards) if not self.file(number).is_file()]

    def file(self, number: int) -> Path:
        return self.folder / shard_name(number, self.manifest.shards)

    def write(self, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes one file under another name, and renames it when it is complete and on the disk."""
        temporary = self.file(number).with_suffix(f".{os.getpid()}.tmp")
        with ArrowWriter(features=self.features, path=str(temporary)) as writer:
            for row in rows:
                writer.write(
                    {
                        name: value.reshape(-1) if isinstance(value, np.ndarray) else value
                        for name, value in row.items()
                    }
                )
            writer.finalize()
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.rename(self.file(number))


def shard_name(number: int, shards: int) -> str:
    return f"answers-{number:05d}-of-{shards:05d}.arrow"


def features_of(manifest: Manifest) -> Features:
    """Types of the columns: flat lists of numbers, of a fixed length unless there is one entry per box."""
    columns: dict[str, Any] = {"image_id": Value("int64"), "view": Value("int32")}
    for name, column in manifest.columns.items():
        shape = column["shape"]
        length = -1 if -1 in shape else int(np.prod(shape))
        columns[name] = Sequence(Value(column["dtype"]), length=length)
    return Features(columns)
