"""`benchmark.py streaming`: memory and images a second of a stream, beside the same data set on the disk."""

import argparse
import io
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from datasets import ClassLabel, Features, Value
from PIL import Image
from torch.utils.data import DataLoader

from ...data import (
    AugmentationConfig,
    DetectionCollator,
    DetectionTransform,
    load_detection_splits,
    load_streamed_splits,
)
from ...data.stream import Progress, Reading, Stamped


FEATURES = Features(
    {
        "image": datasets.Image(),
        "image_id": Value("int64"),
        "objects": [{"bbox": [Value("float32")], "category": ClassLabel(names=["box"])}],
    }
)
KINDS = ("stream", "on the disk")
POINTS = (0.1, 0.25, 0.5, 0.75, 1.0)  # of a pass


def add_streaming(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=100_000, help="Generated images. Default: 100000.")
    parser.add_argument("--shards", type=int, default=16, help="Parquet files of them. Default: 16.")
    parser.add_argument("--side", type=int, default=96, help="Pixels of an image. Default: 96.")
    parser.add_argument("--batch_size", type=int, default=16, help="Images per batch. Default: 16.")
    parser.add_argument("--shuffle_buffer_size", type=int, default=1000, help="Rows of a buffer. Default: 1000.")
    parser.set_defaults(run=streaming)


def streaming(given: argparse.Namespace) -> dict[str, Any]:
    """Prints the table and returns its figures."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder, "rows"), given.rows, given.shards, given.side)
        for kind in KINDS:  # each in a new process, whose memory is its own
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found[kind] = pool.submit(measured, kind, folder, vars(given) | {"run": None}).result()
    print(f"{given.rows} images of {given.side} pixels, batches of {given.batch_size}, CPU seconds")
    print(table(found))
    print(f"A stream that goes on after {given.rows // 2} rows: {found[KINDS[0]]['resume']:.1f} s to its first batch")
    return found


def write_rows(folder: Path, rows: int, shards: int, side: int) -> None:
    """Parquet files of blurred noise with one box each, and four rows to evaluate on."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for shard in range(shards):
        part = range(rows * shard // shards, rows * (shard + 1) // shards)
        content = [row(number, side, generator) for number in part]
        name = f"train-{shard:05d}-of-{shards:05d}.parquet"
        datasets.Dataset.from_list(content, features=FEATURES).to_parquet(folder / name)
    few = [row(number, side, generator) for number in range(4)]
    datasets.Dataset.from_list(few, features=FEATURES).to_parquet(folder / "validation-00000-of-00001.parquet")


def row(number: int, side: int, generator: np.random.Generator) -> dict[str, Any]:
    pixels = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side))
    file = io.BytesIO()
    pixels.save(file, "JPEG")
    start, size = generator.uniform(0, side / 2, 2), generator.uniform(4, side / 2, 2)
    objects = [{"bbox": [*start, *size], "category": 0}]
    return {"image": {"bytes": file.getvalue(), "path": None}, "image_id": number, "objects": objects}


def measured(kind: str, folder: str, given: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: one pass over the training images.

    Returns:
        `dict`: `ready` (seconds to the first batch), `images_per_second` from then on, both of CPU time, `memory`
        (MB of resident memory at each of `POINTS`), `disk` (MB that were written) and `images` (different ones); of
        a stream also `resume`, seconds to the first batch of a run that goes on in the middle of the pass.
    """
    torch.set_num_threads(given["threads"])
    datasets.config.HF_DATASETS_CACHE = cache = Path(folder, f"cache of {kind}")
    begin = time.process_time()
    count = -(-given["rows"] // given["batch_size"])
    points = {max(1, round(point * count)): point for point in POINTS}
    ids: set[int] = set()
    found: dict[str, Any] = {"memory": {}}
    for number, batch in zip(range(1, count + 1), batches(kind, Path(folder, "rows"), given), strict=False):
        ids.update(int(label["image_id"]) for label in batch["labels"])
        if number == 1:
            first = time.process_time()
        if number in points:
            found["memory"][points[number]] = round(psutil.Process().memory_info().rss / 1e6)
    seconds = time.process_time() - first
    if kind == KINDS[0]:
        begin_again = time.process_time()
        next(batches(kind, Path(folder, "rows"), given, given["rows"] // 2))
        found["resume"] = time.process_time() - begin_again
    disk = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    speed = (count - 1) * given["batch_size"] / seconds
    return found | {"ready": first - begin, "images_per_second": speed, "disk": disk / 1e6, "images": len(ids)}


def batches(kind: str, folder: Path, given: dict[str, Any], skipped: int = 0) -> Iterator[dict[str, Any]]:
    """The loader of a run, without augmentation; of a stream after a number of rows that are skipped."""
    side, size = given["side"], given["batch_size"]
    transform = DetectionTransform((side, side), augmentation=AugmentationConfig.none(), normalize=False)
    if kind == KINDS[0]:
        splits = load_streamed_splits(folder, shuffle_buffer_size=given["shuffle_buffer_size"])
        reading = Reading(splits.train.with_transform(transform), [Progress(0, rows=skipped)], 1)
        return iter(DataLoader(reading, size, collate_fn=Stamped(DetectionCollator())))
    data = load_detection_splits(folder).train.with_transform(transform)
    return iter(DataLoader(data, size, shuffle=True, collate_fn=DetectionCollator()))


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    points = " | ".join(f"{point:.0%}" for point in POINTS)
    lines = [f"| | images / s | s to the first batch | MB written | MB of memory at {points} |"]
    lines.append("|---" * (4 + len(POINTS)) + "|")
    for kind, figures in found.items():
        held = " | ".join(str(figures["memory"][point]) for point in POINTS)
        rest = f"{figures['images_per_second']:.0f} | {figures['ready']:.1f} | {figures['disk']:.1f} | {held} |"
        lines.append(f"| {kind} | {rest}")
    return "\n".join(lines)
