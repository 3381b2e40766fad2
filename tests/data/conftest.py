"""Small data sets on disk, and the way to real ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_detrkd.data import ImageRecord
from tests import ROOT


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """Finds a folder of real images by name, under `HF_DETRKD_DATA` or beside the repository, or skips the test."""
    beside = ROOT.resolve().parent / "shared" / "data"
    root = Path(os.environ.get("HF_DETRKD_DATA", beside))

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"no real data: {root / name} is missing, set HF_DETRKD_DATA to the folder that holds {name}")
        return root / name

    return find


@pytest.fixture
def coco_content() -> dict[str, list[dict[str, Any]]]:
    """A healthy COCO dict: three images (the last without boxes), sparse category ids in no order, a crowd box."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "deep/b.png", "width": 20, "height": 50},
            {"id": 5, "file_name": "c.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 90, "bbox": [2, 10, 8, 20], "area": 100.5, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 4, "bbox": [1.5, 2.5, 10, 10]},
            {"id": 3, "image_id": 7, "category_id": 90, "bbox": [0, 0, 40, 15], "iscrowd": 1},
            {"id": 4, "image_id": 7, "category_id": 17, "bbox": [20, 15, 4, 6], "iscrowd": 0},
        ],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 4, "name": "ant"}, {"id": 17, "name": "cat"}],
    }


@pytest.fixture
def coco_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a COCO dict, or any text, with an image file for each entry that has a size."""

    def write(content: Any, split: str = "val", root: Path = tmp_path / "coco") -> Path:
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (root / "annotations" / f"instances_{split}.json").write_text(text)
        (root / split).mkdir(exist_ok=True)
        for entry in content["images"] if isinstance(content, dict) and "images" in content else []:
            path = root / split / entry["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (entry["width"], entry["height"]), (200, 30, 60)).save(path)
        return root

    return write


@pytest.fixture
def record() -> Callable[..., ImageRecord]:
    """A record over a given image and boxes, one class each."""

    def make(image: Image.Image, boxes: Any, crowd: Any = None, image_id: int = 11) -> ImageRecord:
        boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        return ImageRecord(
            image_id=image_id,
            name="a test image",
            load=image.copy,
            boxes=boxes,
            categories=np.arange(len(boxes)),
            area=np.arange(len(boxes)) + 100.0,
            iscrowd=np.zeros(len(boxes), bool) if crowd is None else np.array(crowd, bool),
            width=image.width,
            height=image.height,
        )

    return make
