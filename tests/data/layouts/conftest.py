"""Image files with boxes, to be written in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_detrkd.data import DetectionDataset
from hf_detrkd.data.records import ImageRecord


class Files:
    """Two splits of generated image files with boxes, in the place of a data set."""

    def __init__(self, root: Path, counts: dict[str, int]):
        self.root, self.counts = root, counts

    def splits(self) -> dict[str, Any]:
        found = {}
        generator = np.random.default_rng(0)
        for split, count in self.counts.items():
            records = []
            for number in range(count):
                width, height = 40 + 2 * number, 30 + number
                file = self.root / split / f"{split}_{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file)
                boxes = generator.integers(1, 14, (number % 3, 4)).astype(float)
                records.append(
                    ImageRecord(
                        number,
                        str(file),
                        lambda file=file: Image.open(file),
                        boxes,
                        generator.integers(0, 3, len(boxes)),
                        boxes[:, 2] * boxes[:, 3],
                        np.zeros(len(boxes), bool),
                        width,
                        height,
                    )
                )
            found[split] = dataset_of(records)
        return found


def dataset_of(records: list[ImageRecord]) -> DetectionDataset:
    return DetectionDataset(records, ["ant", "cat", "zebra"])


@pytest.fixture
def splits(tmp_path: Path) -> dict[str, Any]:
    return Files(tmp_path / "plain", {"train": 7, "val": 4}).splits()
