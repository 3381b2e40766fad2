"""What stored answers depend on: the teacher, the images, the views, and the methods' questions."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data import DetectionDataset
from ..data.image_size import plain_image_size
from ..structures.outputs import DetectorSpec


FILE = "manifest.json"
VERSION = 1
MOST_ROWS = 256  # of a file: small passes are shared by several processes, too


@dataclass(frozen=True)
class Manifest:
    """Description of stored answers, `manifest.json` of their folder.

    Attributes:
        teacher (`dict`): `name`, `source` and `revision` of the teacher, `weights` (SHA-256), `parameters`, `classes`
            and `dtype` (of its computation).
        spec (`dict`): fields of the teacher's [`DetectorSpec`].
        images (`dict`): what an image's tensors depend on: sizes, normalisation, augmentation, its seed, views.
        dataset (`dict`): name, split, number of images, and a hash of their ids and annotations.
        questions (`dict[str, dict]`): options of each method that change what the teacher is asked.
        seed (`int`): of the methods' random queries.
        grids (`list`): height and width of the encoder's maps in cells; empty if they depend on the batch.
        columns (`dict[str, dict]`): `dtype` and `shape` of each column; a first dimension of -1 is one entry per box.
        stored (`str`): precision of the numbers, `float16` or `float32`.
        shard (`int`): rows per file.
        rows (`int`): number of rows in all.
    """

    teacher: dict[str, Any]
    spec: dict[str, Any]
    images: dict[str, Any]
    dataset: dict[str, Any]
    questions: dict[str, dict[str, Any]]
    seed: int
    grids: list[list[int]]
    columns: dict[str, dict[str, Any]]
    stored: str
    shard: int
    rows: int
    version: int = field(default=VERSION)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """
        Raises:
            ValueError: the folder has no manifest, or one of another version.
        """
        file = folder / FILE
        if not file.is_file():
            raise ValueError(f"{folder} holds no stored answers ({FILE} is missing): make them with hf-detrkd answer.")
        try:
            content = dict(json.loads(file.read_text()))
            version = content.get("version")
            found = cls(**content)
            dicts = (found.teacher, found.spec, found.images, found.dataset, found.questions, found.columns)
            if not all(isinstance(one, dict) for one in dicts) or not isinstance(found.grids, list):
                raise TypeError("its entries have other types")
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{file} is not readable ({error}): delete the folder and make the answers again."
            ) from error
        if version != VERSION:
            raise ValueError(
                f"The answers in {folder} have version {version}, this package reads {VERSION}: make them again."
            )
        size = plain_image_size(found.images.get("teacher_image_size"))
        return replace(found, images=found.images | {"teacher_image_size": size})

    def write(self, folder: Path) -> None:
        """Writes the file, complete or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{FILE}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        os.replace(temporary, folder / FILE)

    def with_files_of(self, size: int) -> Manifest:
        """The same answers in files of about `size` bytes."""
        return replace(self, shard=min(max(1, size // max(1, self.bytes_per_row)), MOST_ROWS))

    def compared(self) -> dict[str, Any]:
        """What answers have to have in common to lie in one folder: not where the teacher came from."""
        teacher = {n: value for n, value in self.teacher.items() if n not in ("name", "source", "revision")}
        return vars(self) | {"teacher": teacher}

    @property
    def views(self) -> int:
        """Number of augmented views of each image."""
        return int(self.images["views"])

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.rows // self.shard)

    def places(self, number: int) -> range:
        """The rows of a file."""
        return range(number * self.shard, min((number + 1) * self.shard, self.rows))

    @property
    def bytes_per_row(self) -> int:
        """Size of a row, an entry per box counted once."""
        sizes = {"float16": 2, "float32": 4, "int32": 4}
        total = 0
        for column in self.columns.values():
            number = 1
            for side in column["shape"]:
                number *= abs(side)
            total += number * sizes[column["dtype"]]
        return total

    def detector_spec(self) -> DetectorSpec:
        """The teacher's properties."""
        fields = dict(self.spec)
        fields["query_fields"] = frozenset(fields["query_fields"])
        fields["features"] = {name: tuple(widths) for name, widths in fields["features"].items()}
        return DetectorSpec(**fields)


def dataset_facts(dataset: DetectionDataset, names: Mapping[str, Any]) -> dict[str, Any]:
    """[`Manifest.dataset`], of a data set with the `name` and `split` of `names`."""
    images = {"images": len(dataset), "hash": dataset.images_hash()}
    return {"name": names["name"], "split": names["split"]} | images


def images_facts(dataset: DetectionDataset, names: Mapping[str, Any], form: str) -> dict[str, Any]:
    """[`Manifest.images`], with the `teacher_image_size` of `names`; the form is `views` or `moved`."""
    return dataset.described() | {"teacher_image_size": names["teacher_image_size"], "form": form}


def spec_fields(spec: DetectorSpec) -> dict[str, Any]:
    """The fields of a [`DetectorSpec`] as plain values, without its supervision."""
    fields = {name: value for name, value in vars(spec).items() if name != "supervision"}
    features = {name: list(widths) for name, widths in spec.features.items()}
    return fields | {"query_fields": sorted(spec.query_fields), "features": features}


def first_difference(stored: Any, wanted: Any, name: str) -> str | None:
    """Where two nested values differ first, as `name is A in the answers, B in this run`; `None` if they are equal."""
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        for key in [*wanted, *(k for k in stored if k not in wanted)]:
            found = first_difference(stored.get(key), wanted.get(key), f"{name}.{key}")
            if found is not None:
                return found
        return None
    if _plain(stored) == _plain(wanted):
        return None
    return f"{name} is {_plain(stored)} in the answers and {_plain(wanted)} in this run"


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON reads them."""
    return [_plain(one) for one in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
