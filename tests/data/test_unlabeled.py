"""Images that nobody labelled, and their share of a batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Features
from PIL import Image
from torch.utils.data import BatchSampler

from hf_detrkd.data import DatasetError, DetectionTransform, load_detection_splits, unlabeled
from hf_detrkd.data.share_sampler import ShareSampler
from hf_detrkd.data.unlabeled import image_files, split_labels
from tests.data.layouts.test_rows import make


SHAPES = {"max_train_samples": 10, "max_eval_samples": 2, "shapes_size": (64, 64)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images in folders, beside other files."""
    (tmp_path / "deeper").mkdir()
    for number, name in enumerate(("b.png", "a.JPG", "deeper/c.webp")):
        Image.new("RGB", (40 + number, 30)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_of_images_follows_the_labelled_ones(folder: Path) -> None:
    splits = load_detection_splits("shapes", **SHAPES, unlabeled_name=folder)
    data = splits.all_train
    assert (len(splits.train), len(data), data.labeled().tolist()) == (10, 13, [True] * 10 + [False] * 3)
    records = [data.records[place] for place in range(13)]
    assert [record.image_id for record in records] == [*range(10), -1, -2, -3]
    assert [Path(record.name).name for record in records[10:]] == ["a.JPG", "b.png", "c.webp"]
    assert [(record.width, record.height) for record in records[10:]] == [(41, 30), (40, 30), (42, 30)]
    assert len({record.fingerprint for record in records}) == 13
    items = data.with_transform(DetectionTransform((64, 64)))
    assert items[11]["labels"]["labeled"] is False and len(items[11]["labels"]["boxes"]) == 0
    assert "labeled" not in items[3]["labels"]


def test_the_header_of_an_image_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, read = image_files(folder), []
    monkeypatch.setattr(unlabeled, "read_size", lambda path: read.append(path) or (4, 3))
    assert [(records[1].width, records[1].height) for _ in range(3)] == [(4, 3)] * 3
    assert len(read) == 1


def test_other_sources_lose_their_labels(tmp_path: Path) -> None:
    rows = make()
    (tmp_path / "none").mkdir()
    saved, bare = tmp_path / "saved", rows.remove_columns("objects")
    datasets.DatasetDict({"train": rows, "unlabeled": bare.select([0, 1])}).save_to_disk(str(saved))
    for source, count in ((rows, 3), (bare, 3), (str(saved), 2), ("shapes", 2000)):
        splits = load_detection_splits("shapes", **SHAPES, unlabeled_name=source)
        assert splits.unlabeled is not None and len(splits.unlabeled) == count
        assert len(splits.all_train.records[10].boxes) == 0 and splits.all_train.classes == splits.train.classes
    with pytest.raises(DatasetError, match="holds no images"):
        load_detection_splits("shapes", **SHAPES, unlabeled_name=tmp_path / "none")
    text = datasets.Dataset.from_dict({"text": ["a"]}, features=Features({"text": datasets.Value("string")}))
    with pytest.raises(DatasetError, match=r"must have a column `image` .* but has \['text'\]"):
        load_detection_splits("shapes", **SHAPES, unlabeled_name=text)


def test_a_fraction_of_the_labels_is_kept_and_the_other_images_stay(folder: Path) -> None:
    splits = load_detection_splits("shapes", **SHAPES, labeled_fraction=0.3)
    again = load_detection_splits("shapes", **SHAPES, labeled_fraction=0.3, unlabeled_name=folder)
    kept = [record.image_id for record in splits.train.records]
    assert len(kept) == 3 and kept == sorted(kept) == [record.image_id for record in again.train.records]
    rest = [-1 - record.image_id for record in splits.all_train.records][3:]
    assert sorted(kept + rest) == list(range(10))
    assert len(again.all_train) == 13
    other, _ = split_labels(load_detection_splits("shapes", **SHAPES).train, 0.3, seed=1)
    assert [record.image_id for record in other.records] != kept
    few, others = split_labels(load_detection_splits("shapes", **SHAPES).train, 0.01, seed=1)
    assert (len(few), len(others)) == (1, 9)


def sampler(fraction: float, size: int = 4, seed: int = 0) -> ShareSampler:
    data = load_detection_splits("shapes", **SHAPES, labeled_fraction=0.3).all_train
    return ShareSampler(data, size, fraction, seed)


@pytest.mark.parametrize(("fraction", "unknown"), [(0.01, 1), (0.5, 2), (0.7, 3), (0.99, 3)])
def test_every_batch_has_its_share(fraction: float, unknown: int) -> None:
    order = list(sampler(fraction))
    assert len(order) == len(sampler(fraction))
    batches = np.array(order).reshape(-1, 4)
    assert ((batches >= 3).sum(1) == unknown).all()
    assert set(batches[batches < 3].tolist()) == {0, 1, 2}  # every labelled image, in every epoch


def test_unlabelled_images_come_in_rounds_that_go_on_over_epochs() -> None:
    one = sampler(0.5)
    seen: list[int] = []
    for epoch in range(7):
        one.dataset.set_epoch(epoch)
        seen += [place for place in one if place >= 3]
    assert len(seen) == 28
    for first in (0, 7, 14, 21):  # seven unlabelled images
        assert sorted(seen[first : first + 7]) == list(range(3, 10))
    assert Counter(seen).most_common()[0][1] == 4
    assert seen[:7] != seen[7:14]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first, second, other = sampler(0.5), sampler(0.5), sampler(0.5, seed=1)
    assert list(first) == list(second) != list(other)
    before = list(first)
    torch.manual_seed(5)
    first.dataset.set_epoch(2)
    assert list(first) != before
    first.dataset.set_epoch(0)
    assert list(first) == before


def test_a_batch_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="Batches need at least 2 images on each process"):
        sampler(0.5, size=1)


def test_every_process_gets_batches_of_its_own_with_the_share() -> None:
    one = sampler(0.5, size=2)
    batches = [list(BatchSamplerShard(BatchSampler(one, 2, drop_last=False), 2, number)) for number in (0, 1)]
    for mine in batches:
        assert all(sorted(place >= 3 for place in batch) == [False, True] for batch in mine)
    whole = np.array(list(one)).reshape(-1, 2).tolist()
    assert batches[0] == whole[::2] and batches[1][:1] == whole[1::2]
