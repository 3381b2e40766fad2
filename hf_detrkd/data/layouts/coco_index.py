"""Indices of large COCO JSON files in the cache: their checked annotations as arrays that processes map and share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
import uuid
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..detection import DetectionDataset
from ..records import AnnotationTable, RepairedBoxes, TableRecords


logger = logging.getLogger(__name__)

FORMAT = 1  # to be raised when other things are read of a file, or checked
LEAST = 4 * 2**20  # bytes: smaller files are read in a moment
SAMPLE = 2**20  # bytes at either end of a file that are part of the index's name
TICK = 2.0  # seconds: the coarsest times of modification of a file system

COLUMNS = ("offsets", "boxes", "categories", "area", "iscrowd")


@dataclass(frozen=True)
class Indexed:
    """The content of an index.

    Attributes:
        arrays (`dict[str, numpy.ndarray]`): the columns of [`AnnotationTable`], and `image_ids` and `sizes` of
            [`TableRecords`].
        names (`list[str]`): the images' `file_name`s.
        classes (`list[str]`), category_ids (`list[int]`): as in [`DetectionDataset`].
        repaired (`dict[str, float]`): the values of [`RepairedBoxes`] except the source.
    """

    arrays: Mapping[str, np.ndarray]
    names: list[str]
    classes: list[str]
    category_ids: list[int]
    repaired: dict[str, Any]

    @classmethod
    def of(cls, dataset: DetectionDataset, names: list[str]) -> Indexed:
        """The index of a data set that was read from its JSON file."""
        records, repaired = dataset.records, dataset.repaired
        assert isinstance(records, TableRecords) and repaired is not None
        arrays = {name: getattr(records.table, name) for name in COLUMNS}
        arrays |= {"image_ids": records.image_ids, "sizes": records.sizes}
        counts = {name: value for name, value in dataclasses.asdict(repaired).items() if name != "source"}
        return cls(arrays, names, dataset.classes, dataset.category_ids, counts)

    @property
    def image_ids(self) -> np.ndarray:
        return self.arrays["image_ids"]

    @property
    def sizes(self) -> np.ndarray:
        return self.arrays["sizes"]

    def table(self, repaired: RepairedBoxes) -> AnnotationTable:
        return AnnotationTable(**{name: self.arrays[name] for name in COLUMNS}, repaired=repaired)


@dataclass(frozen=True)
class CocoIndex:
    """The place of an index, whether or not it is there.

    It lies in the cache of the `datasets` library. Its name holds the JSON file's path, size and time of modification,
    and a hash of both of its ends: a hash of everything would read the whole file, which an index is to spare. Its
    content has a checksum. A file that was changed, or an index that is damaged, is read from JSON again.

    Attributes:
        folder (`Path`): of all indices.
        path_hash (`str`): of the JSON file's path; of one file only the newest index stays.
        file_hash (`str`): of the rest.
    """

    folder: Path
    path_hash: str
    file_hash: str

    @property
    def file(self) -> Path:
        return self.folder / f"{self.path_hash}-{self.file_hash}.safetensors"

    def read(self) -> Indexed | None:
        """The content, mapped into memory; `None` if there is none or it is damaged."""
        try:
            with safe_open(self.file, framework="pt") as content:  # numpy's form copies
                arrays = {name: content.get_tensor(name).numpy() for name in content.keys()}  # noqa: SIM118
                checksum = (content.metadata() or {}).get("checksum")
        except (OSError, SafetensorError) as error:
            logger.debug("There is no index %s: %s", self.file, error)
            return None
        if checksum != _checksum(arrays):
            logger.debug("The index %s is damaged.", self.file)
            return None
        return Indexed(arrays, **json.loads(arrays.pop("about").tobytes()))

    def write(self, content: Indexed) -> None:
        """Writes the index whole or not at all; a folder that cannot be written to is no error. Removes older indices
        of the file, and what a writer that was killed has left."""
        about = {name: getattr(content, name) for name in ("names", "classes", "category_ids", "repaired")}
        arrays = {name: np.ascontiguousarray(array) for name, array in content.arrays.items()}
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
        new = self.folder / f"{self.path_hash}-{uuid.uuid4().hex}.new"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(arrays, new, {"checksum": _checksum(arrays)})
            new.replace(self.file)
            for older in set(self.folder.glob(f"{self.path_hash}-*")) - {self.file}:
                older.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            logger.debug("The index %s was not written: %s", self.file, error)
        finally:
            with suppress(OSError):
                new.unlink()  # what a full disk left


def index_of(path: Path) -> CocoIndex | None:
    """The index of a JSON file; `None` if it is too small to need one, too new for a change to show in its time of
    modification, or not there."""
    try:
        state = path.stat()
        if state.st_size < LEAST or time.time() - state.st_mtime < TICK:
            return None
        with path.open("rb") as file:
            ends = file.read(SAMPLE)
            file.seek(max(0, state.st_size - SAMPLE))
            ends += file.read()
    except OSError:
        return None
    text = f"{FORMAT}|{state.st_size}|{state.st_mtime_ns}|".encode()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_detrkd_coco"
    return CocoIndex(folder, _hash(str(path.resolve()).encode(errors="surrogateescape")), _hash(text + ends))


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    total = 0
    for name in sorted(arrays):
        array = arrays[name]
        total = zlib.crc32(f"{name}{array.dtype}{array.shape}".encode(), total)
        total = zlib.crc32(array.reshape(-1).view(np.uint8).data, total)
    return str(total)
