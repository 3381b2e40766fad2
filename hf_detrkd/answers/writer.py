"""Writes answers as Arrow files of the `datasets` library, each of which is complete or not there."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from datasets import Features, Sequence, Value
from datasets.arrow_writer import ArrowWriter

from .manifest import FILE, Manifest, first_difference


BUFFERED = 64  # rows in memory before they are written


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
            other = first_difference(Manifest.read(folder).compared(), manifest.compared(), "manifest")
            if other is not None:
                raise ValueError(f"{folder} holds other answers: {other}. Choose another folder, or delete this one.")
        self.features = features_of(manifest)

    def begin(self) -> None:
        """Writes the manifest if there is none, and removes what stopped processes of this machine left; only one
        process calls it, before others write."""
        if not (self.folder / FILE).is_file():
            self.manifest.write(self.folder)
        for left in self.folder.glob(f"*.{socket.gethostname()}-*.tmp"):
            process = left.suffixes[-2].rpartition("-")[2]
            if not process.isdigit() or not psutil.pid_exists(int(process)):
                left.unlink(missing_ok=True)

    def missing(self) -> list[int]:
        """Numbers of the files that are not written yet."""
        return [number for number in range(self.manifest.shards) if not self.file(number).is_file()]

    def file(self, number: int) -> Path:
        return self.folder / shard_name(number, self.manifest.shards)

    def write(self, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes one file under another name, and renames it when it is complete and on the disk."""
        temporary = self.file(number).with_suffix(f".{socket.gethostname()}-{os.getpid()}.tmp")
        with ArrowWriter(features=self.features, path=str(temporary), writer_batch_size=BUFFERED) as writer:
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
        temporary.replace(self.file(number))


def shard_name(number: int, shards: int) -> str:
    return f"answers-{number:05d}-of-{shards:05d}.arrow"


def features_of(manifest: Manifest) -> Features:
    """Types of the columns: flat lists of numbers, of a fixed length unless there is one entry per box."""
    columns: dict[str, Any] = {"image_id": Value("int64"), "view": Value("int32"), "fingerprint": Value("int64")}
    for name, column in manifest.columns.items():
        shape = column["shape"]
        length = -1 if -1 in shape else int(np.prod(shape))
        columns[name] = Sequence(Value(column["dtype"]), length=length)
    return Features(columns)
