"""Streams of small generated images, whose ids and colours are their numbers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Features, Value
from PIL import Image

from hf_detrkd.data.shapes import SHAPE_CLASSES
from hf_detrkd.data.stream import streams_work


NEEDS_STREAMS = pytest.mark.skipif(not streams_work(), reason="this version of datasets is too old for streams")

BOX = [8.0, 6.0, 20.0, 15.0]
SIZE = (40, 30)  # width and height


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", SIZE, (number % 256, 200, 30)).save(stream, "PNG")
    return stream.getvalue()


def features(category: Any = None, **more: Any) -> Features:
    objects = [{"bbox": [Value("float32")], "category": category or ClassLabel(names=SHAPE_CLASSES)}]
    return Features({"image": datasets.Image(), "image_id": Value("int64"), "objects": objects, **more})


def row(number: int, **changes: Any) -> dict[str, Any]:
    objects = [{"bbox": BOX, "category": number % len(SHAPE_CLASSES)}]
    image = {"bytes": png(number), "path": f"{number}.png"}
    return {"image": image, "image_id": number, "objects": objects} | changes


def data_set(count: int, changes: dict[int, dict[str, Any]] | None = None, category: Any = None) -> datasets.Dataset:
    """Rows, some of them with changes of their columns."""
    rows = [row(number, **(changes or {}).get(number, {})) for number in range(count)]
    return datasets.Dataset.from_list(rows, features=features(category))


def stream(count: int, shards: int = 1, **options: Any) -> datasets.IterableDataset:
    """The same as a stream."""
    return data_set(count, **options).to_iterable_dataset(shards)


def write_parquet(folder: Path, train: int, shards: int, evaluation: int = 8) -> Path:
    """A folder of Parquet files, in several shards of the training split."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = data_set(train)
    for shard in range(shards):
        part = whole.shard(shards, shard, contiguous=True)
        part.to_parquet(folder / f"train-{shard:05d}-of-{shards:05d}.parquet")
    data_set(evaluation).to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder
