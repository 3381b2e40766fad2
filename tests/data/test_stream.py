"""Streams of rows: every row once in a pass, in an order that can be taken up again, and checked as it is read."""

from __future__ import annotations

import copy
import io
import json
import logging
import tarfile
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import ClassLabel, Features, Value
from torch.utils.data import DataLoader

from hf_detrkd.data import (
    DatasetError,
    DetectionStream,
    DetectionTransform,
    RowStream,
    UnreadableImageError,
    load_detection_splits,
    load_streamed_splits,
)
from hf_detrkd.data import detection_stream as streaming
from hf_detrkd.data.shapes import SHAPE_CLASSES
from hf_detrkd.data.stream import PROGRESS, Progress, Reading, Stamped
from tests import streams


pytestmark = streams.NEEDS_STREAMS


TRANSFORM = DetectionTransform((8, 8))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the `datasets` library for one test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def make(count: int = 12, shards: int = 4, buffer: int = 5, seed: int = 0, **options: Any) -> DetectionStream:
    names = ("class_names", "skip_unreadable_images", "max_samples")
    own = {name: options.pop(name) for name in names if name in options}
    rows = streams.stream(count, shards, **options)
    return DetectionStream(rows, "data", shuffle_buffer_size=buffer, **own).with_transform(TRANSFORM, seed)


def image_id(item: dict[str, Any]) -> int:
    return int(item["labels"]["image_id"])


def ids_of(reading: Any, epoch: int = 0) -> list[int]:
    """The images of one pass of a reader."""
    passes = ((one.passes, image_id(item)) for one, item in reading)
    return [number for read, number in takewhile(lambda pair: pair[0] <= epoch, passes) if read == epoch]


def batches(stream: DetectionStream, workers: int, process: int, processes: int, count: int) -> list[dict[str, Any]]:
    """The first batches of two images of a process."""
    readers = [Progress(reader) for reader in range(process * max(1, workers), (process + 1) * max(1, workers))]
    reading = Reading(stream, readers, len(readers) * processes)
    collate = Stamped(lambda items: {"ids": [image_id(item) for item in items]})
    return list(islice(DataLoader(reading, 2, collate_fn=collate, num_workers=workers), count))


@pytest.mark.parametrize("shards", [1, 3, 4, 12, 41])
@pytest.mark.parametrize("readers", [1, 2, 3, 4])
def test_in_every_pass_the_readers_see_every_row_once(readers: int, shards: int) -> None:
    stream, orders, shares = make(41, shards), [], []
    for epoch in range(3):
        parts = [ids_of(Reading(stream, [Progress(reader)], readers), epoch) for reader in range(readers)]
        assert sorted(chain(*parts)) == list(range(41)), f"pass {epoch}"
        assert all(parts)
        orders.append(list(chain(*parts)))
        shares.append(set(parts[0]))
    assert orders[0] != orders[1] != orders[2]
    assert readers == 1 or shares[0] != shares[1], "a reader has another share in the next pass"


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_loaders_do_not_split_the_rows_once_more(processes: int, workers: int) -> None:
    """24 rows in 4 shards: each reader has 6 in a pass, which are 3 batches of it."""
    read = 3 * 4 // processes if workers else 12 // processes
    found = [batch for process in range(processes) for batch in batches(make(24), workers, process, processes, read)]
    assert sorted(number for batch in found for number in batch["ids"]) == list(range(24))
    assert {Progress(*batch[PROGRESS]).passes for batch in found} == {0}
    assert {batch[PROGRESS][0] for batch in found} == set(range(processes * max(1, workers)))


def test_a_stream_in_a_loader_of_ones_own_shares_its_rows_among_the_workers() -> None:
    loader = DataLoader(make(24), 2, collate_fn=lambda items: [image_id(item) for item in items], num_workers=2)
    assert sorted(chain(*islice(loader, 12))) == list(range(24))


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("readers", [1, 2])
def test_a_reader_goes_on_where_it_was(readers: int, shards: int) -> None:
    whole = list(islice(Reading(make(12, shards), [Progress(readers - 1)], readers), 40))
    assert whole[-1][0].passes > 2
    for place in (0, 4, 5, 11, 12, 30):
        rest = list(islice(Reading(make(12, shards), [whole[place][0]], readers), 39 - place))
        assert [one for one, _ in rest] == [one for one, _ in whole[place + 1 :]]
        for (_, item), (_, other) in zip(rest, whole[place + 1 :], strict=True):
            assert image_id(item) == image_id(other) and torch.equal(item["pixel_values"], other["pixel_values"])


def test_rows_before_the_place_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = streaming.read_image
    monkeypatch.setattr(streaming, "read_image", lambda source, name: read.append(name) or original(source, name))
    next(iter(Reading(make(), [Progress(0, passes=2, rows=7)], 1)))
    assert len(read) == 1


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(7)
    one = ids_of(Reading(make(40, seed=1), [Progress(0)], 1))
    torch.manual_seed(8)
    assert one == ids_of(Reading(make(40, seed=1), [Progress(0)], 1)) != sorted(one)
    assert one != ids_of(Reading(make(40, seed=2), [Progress(0)], 1))


def test_augmented_images_differ_from_pass_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    stream = make()
    stream.transform = lambda image, record, seed: seeds.append(seed) or {"labels": {"image_id": record.image_id}}
    parts = [list(islice(Reading(stream, [Progress(reader)], 2), 12)) for reader in range(2)]  # two passes each
    assert len(set(seeds)) == len(seeds) == 24 and len(parts) == 2


def test_a_limit_takes_the_first_rows_for_all_readers() -> None:
    parts = [ids_of(Reading(make(40, max_samples=9), [Progress(reader)], 2)) for reader in range(2)]
    assert sorted(chain(*parts)) == list(range(9))


def test_readers_without_equal_shares_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Reading(make(12, 4), [Progress(0)], 2)
        Reading(make(41, 41), [Progress(0)], 4)
        assert not caplog.text
        Reading(make(12, 4), [Progress(0)], 3)
    assert "data has 4 shards, which 3 readers" in caplog.text and "multiple of 3 files" in caplog.text


def test_parquet_is_shared_by_row_groups(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    streams.data_set(40).to_parquet(tmp_path / "rows" / "train.parquet", batch_size=2)
    rows = datasets.load_dataset(str(tmp_path / "rows"), split="train", streaming=True)
    stream = DetectionStream(rows, "data").with_transform(TRANSFORM)
    readings = [Reading(stream, [Progress(reader)], 2) for reader in range(2)]
    assert readings[0].by_shards == (rows.reshard().num_shards == 20)  # not in every version of datasets
    assert sorted(chain(*map(ids_of, readings))) == list(range(40))


def test_items_are_those_of_the_data_set() -> None:
    rows = streams.data_set(12)
    whole = load_detection_splits({"train": rows, "val": rows}).train.with_transform(TRANSFORM)
    stream = DetectionStream(rows.to_iterable_dataset(3)).with_transform(TRANSFORM)
    for item in islice(stream, 12):
        other = whole[image_id(item)]
        assert torch.equal(item["pixel_values"], other["pixel_values"])
        assert item["labels"].keys() == other["labels"].keys()
        assert all(torch.equal(value, other["labels"][name]) for name, value in item["labels"].items())


def boxes(*given: list[float], category: Any = 0) -> dict[str, Any]:
    return {"objects": [{"bbox": box, "category": category} for box in given]}


def test_boxes_are_repaired_and_counted_row_by_row(caplog: pytest.LogCaptureFixture) -> None:
    changes = {3: boxes([30, 20, 30, 30], [50, 0, 5, 5], streams.BOX), 5: boxes([1, 1, 0, 4])}
    with caplog.at_level(logging.WARNING):
        items = list(islice(Reading(make(changes=changes, buffer=1), [Progress(0)], 1), 12))
    found = {image_id(item): item["labels"]["boxes"] for _, item in items}
    assert len(found[3]) == 2 and len(found[5]) == 0 and found[3].max() <= 1
    assert items[-1][0] == Progress(0, 0, 12, images=12, boxes=14, dropped=2, clipped=1)
    assert not caplog.text, "a long run must not log every row"


BAD = {
    "three numbers": (
        boxes([1.0, 2.0, 3.0]),
        r"data, 5.png has 1 problem .*: the row has the box .*, not four",
    ),
    "no number": (boxes([1.0, 2.0, float("nan"), 4.0]), "the row has the box .*, which is not finite"),
    "no class": (boxes(streams.BOX, category=None), "the row has the unknown category None"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_repaired_names_its_row(name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(DatasetError, match=message):
        ids_of(Reading(make(changes={5: change}), [Progress(0)], 1))


UNREADABLE = {
    "torn": {"image": {"bytes": streams.png(5)[:60], "path": "5.png"}},
    "none": {"image": None},
    "missing": {"image": {"bytes": None, "path": "/nowhere/5.png"}},
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_images_stop_or_are_skipped_and_counted(kind: str) -> None:
    changes = {5: UNREADABLE[kind]}
    with pytest.raises(UnreadableImageError, match="--skip_unreadable_images"):
        ids_of(Reading(make(changes=changes), [Progress(0)], 1))
    reading = Reading(make(changes=changes, skip_unreadable_images=True, buffer=1), [Progress(0)], 1)
    items = list(islice(reading, 22))
    assert sorted(image_id(item) for _, item in items[:11]) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert items[-1][0].unreadable in (1, 2) and items[-1][0].images == 22 and items[-1][0].passes == 1


def test_images_are_read_from_any_file_system(tmp_path: Path) -> None:
    (tmp_path / "5.png").write_bytes(streams.png(5))
    changes = {5: {"image": {"bytes": None, "path": f"file://{tmp_path}/5.png"}}}
    assert len(ids_of(Reading(make(changes=changes), [Progress(0)], 1))) == 12


def test_an_image_of_another_size_than_annotated_is_an_error() -> None:
    rows = streams.data_set(2).add_column("width", [41, 41]).add_column("height", [30, 30]).to_iterable_dataset()
    with pytest.raises(DatasetError, match="40x30 pixels after its EXIF orientation, but its annotations say 41x30"):
        next(iter(DetectionStream(rows).with_transform(TRANSFORM)))


def test_a_pass_without_any_image_is_an_error() -> None:
    none = dict.fromkeys(range(3), UNREADABLE["torn"])
    with pytest.raises(DatasetError, match="None of 3 images of data in share 0 can be read"):
        next(iter(Reading(make(3, 1, changes=none, skip_unreadable_images=True), [Progress(0)], 1)))
    with pytest.raises(DatasetError, match=r"data has no rows for reader 3 of 4: .* lower --dataloader_num_workers"):
        next(iter(Reading(make(3, 3), [Progress(3)], 4)))


def test_class_names_come_from_the_features_or_are_given() -> None:
    assert make().classes == SHAPE_CLASSES
    words = {number: boxes(streams.BOX, category="ab"[number % 2]) for number in range(12)}
    stream = make(changes=words, category=Value("string"), class_names=["b", "a"])
    labels = {image_id(item): int(item["labels"]["class_labels"]) for item in islice(stream, 12)}
    assert stream.classes == ["b", "a"] and labels[0] == 1 and labels[1] == 0
    numbers = make(category=Value("int64"), class_names=list("abcdef"))
    assert next(iter(numbers))["labels"]["class_labels"].tolist() in [[number] for number in range(6)]
    with pytest.raises(DatasetError, match="unknown category"):
        list(islice(make(category=Value("int64"), class_names=["a", "b"]), 12))


def test_class_names_that_are_not_known_are_asked_for() -> None:
    with pytest.raises(DatasetError, match=r"The classes of data are not known before its end, .*--class_names"):
        make(category=Value("int64"))
    with pytest.raises(DatasetError, match=r"data names its classes \['disc'.*: leave out --class_names"):
        make(class_names=["a"])
    with pytest.raises(DatasetError, match="--class_names must be different names"):
        make(category=Value("int64"), class_names=["a", "a"])


def test_what_is_no_stream_of_rows_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"must be a `datasets.IterableDataset` with features, got Dataset"):
        DetectionStream(streams.data_set(2))
    with pytest.raises(DatasetError, match="got one without known columns"):
        DetectionStream(streams.stream(2).map(lambda row: row))
    with pytest.raises(DatasetError, match="must have the columns `image` and `objects`"):
        DetectionStream(datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset())
    with pytest.raises(DatasetError, match="`shuffle_buffer_size` of data must be at least 1, got 0"):
        make(buffer=0)
    with pytest.raises(ValueError, match="A stream has no augmentation views"):
        make().with_transform(TRANSFORM, views=4)
    with pytest.raises(ValueError, match=r"The stream has no transform: call `with_transform"):
        next(iter(DetectionStream(streams.stream(2))))


def test_the_head_is_checked_like_a_data_set() -> None:
    assert len(make().head(5)) == 5
    with pytest.raises(DatasetError, match=r"data, the first 12 rows has 1 problem to correct before training"):
        make(changes={3: boxes([1.0, 2.0])}).head()
    assert len(make(changes={3: UNREADABLE["torn"]}, skip_unreadable_images=True).head()) == 11
    with pytest.raises(DatasetError, match="None of the first 100 rows of data has an image that can be read"):
        make(1, 1, changes={0: UNREADABLE["none"]}, skip_unreadable_images=True).head()


def test_ready_items_pass_as_they_are_and_are_shuffled_anew() -> None:
    rows = datasets.Dataset.from_dict({"n": list(range(20))}).to_iterable_dataset(2).shuffle(seed=1, buffer_size=8)
    pairs = islice(Reading(RowStream(rows.map(lambda row: row | {"more": "x"})), [Progress(0)], 1), 40)
    items = [item for _, item in pairs]
    first, second = ([item["n"] for item in part] for part in (items[:20], items[20:]))
    assert items[0].keys() == {"n", "more"}
    assert sorted(first) == sorted(second) == list(range(20)) and first != second


# --- whole data sets ---


def test_a_folder_of_parquet_gives_a_stream_and_a_data_set(tmp_path: Path, cache: Path, caplog) -> None:
    folder = streams.write_parquet(tmp_path / "rows", 24, 4)
    splits = load_streamed_splits(folder, max_eval_samples=5)
    assert (splits.train_name, splits.eval_name, len(splits.eval)) == ("train", "validation", 5)
    assert splits.train.classes == splits.eval.classes == SHAPE_CLASSES
    assert splits.train.rows.num_shards == 4 and splits.all_train is splits.train
    assert sorted(ids_of(Reading(splits.train.with_transform(TRANSFORM), [Progress(0)], 1))) == list(range(24))
    whole = load_detection_splits(folder).eval.with_transform(TRANSFORM)
    item = splits.eval.with_transform(TRANSFORM)[3]
    assert torch.equal(item["pixel_values"], whole[3]["pixel_values"])


def test_the_evaluation_set_is_copied_once_until_its_files_change(tmp_path: Path, cache: Path) -> None:
    folder = streams.write_parquet(tmp_path / "rows", 8, 1)
    for _ in range(2):
        load_streamed_splits(folder)
        copies = list(cache.rglob("*.arrow"))
        assert len(copies) == 1
    streams.write_parquet(folder, 8, 1, evaluation=5)
    assert len(load_streamed_splits(folder).eval) == 5


def test_rows_on_the_disk_stream_too(tmp_path: Path) -> None:
    saved = datasets.DatasetDict({"train": streams.data_set(10), "test": streams.data_set(4)})
    saved.save_to_disk(tmp_path / "saved")
    splits = load_streamed_splits(tmp_path / "saved", max_train_samples=7, max_eval_samples=3)
    assert len(splits.eval) == 3 and splits.eval_name == "test"
    assert sorted(ids_of(Reading(splits.train.with_transform(TRANSFORM), [Progress(0)], 1))) == list(range(7))


def write_tar(file: Path, numbers: range, flat: bool = False, changes: dict[int, Any] | None = None) -> None:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for number in numbers:
            objects: Any = [{"bbox": streams.BOX, "category": "ab"[number % 2]}] * 2
            if flat:
                objects = {key: [entry[key] for entry in objects] for key in ("bbox", "category")}
            content = {"image_id": number} | (objects if flat else {"objects": objects})
            content = (changes or {}).get(number, content)
            for name, data in (("png", streams.png(number)), ("json", json.dumps(content).encode())):
                info = tarfile.TarInfo(f"{number:06d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("flat", [False, True])
def test_webdataset_is_read(tmp_path: Path, flat: bool) -> None:
    for shard in range(2):
        write_tar(tmp_path / "wds" / f"train-{shard:04d}.tar", range(shard * 6, shard * 6 + 6), flat)
    write_tar(tmp_path / "wds" / "validation-0000.tar", range(4), flat)
    splits = load_streamed_splits(tmp_path / "wds", class_names=["a", "b"])
    assert len(splits.eval) == 4 and len(splits.eval.records[3].boxes) == 2
    parts = [Reading(splits.train.with_transform(TRANSFORM), [Progress(reader)], 2) for reader in range(2)]
    assert sorted(chain(*map(ids_of, parts))) == list(range(12))
    item = next(iter(splits.train.with_transform(TRANSFORM)))
    assert item["labels"]["class_labels"].tolist() == [image_id(item) % 2] * 2


@pytest.mark.parametrize("content", [[1], {"objects": 5}, {"objects": [5]}, {"image_id": "x", "objects": []}], ids=str)
def test_a_row_of_other_types_is_one_sentence(tmp_path: Path, content: Any) -> None:
    write_tar(tmp_path / "wds" / "train-0000.tar", range(12), changes={8: content})
    rows = datasets.load_dataset(str(tmp_path / "wds"), split="train", streaming=True)
    stream = DetectionStream(rows, "data", ["a", "b"]).with_transform(TRANSFORM)
    with pytest.raises(DatasetError, match="A row of data is not of the types of its columns"):
        list(islice(stream, 12))


def test_missing_splits_and_what_cannot_be_streamed_are_refused(tmp_path: Path) -> None:
    folder = streams.write_parquet(tmp_path / "rows", 4, 1)
    with pytest.raises(DatasetError, match="has no split 'other': choose one of train, validation"):
        load_streamed_splits(folder, train_split="other")
    with pytest.raises(DatasetError, match="shapes is generated image by image and cannot be streamed"):
        load_streamed_splits("shapes")
    with pytest.raises(DatasetError, match=r"No data set .* was found"):
        load_streamed_splits(tmp_path / "nothing")
    with pytest.raises(DatasetError, match=r"The classes of .* are not known"):
        write_tar(tmp_path / "wds" / "train-0000.tar", range(3))
        write_tar(tmp_path / "wds" / "test-0000.tar", range(3))
        load_streamed_splits(tmp_path / "wds")


def test_known_lengths_are_those_of_the_data_set() -> None:
    rows = streams.stream(4)
    info = copy.deepcopy(rows.info)
    info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=1000)})
    long = datasets.IterableDataset(rows._ex_iterable, info=info, split=datasets.Split.TRAIN)
    assert DetectionStream(long).num_rows == 1000 and DetectionStream(long, max_samples=10).num_rows == 10
    assert make().num_rows is None


def test_a_class_label_may_be_in_any_field() -> None:
    objects = [{"bbox": [Value("float32")], "label": ClassLabel(names=["x", "y"])}]
    features = Features({"image": datasets.Image(), "objects": objects})
    content = [{"image": {"bytes": streams.png(0), "path": None}, "objects": [{"bbox": streams.BOX, "label": 1}]}]
    rows = datasets.Dataset.from_list(content, features=features).to_iterable_dataset()
    item = next(iter(DetectionStream(rows).with_transform(TRANSFORM)))
    assert item["labels"]["class_labels"].tolist() == [1] and image_id(item) == 0


def test_a_version_of_datasets_that_is_too_old_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_detrkd.data.stream.datasets.__version__", "3.6.0")
    with pytest.raises(DatasetError, match=r"Streams need datasets>=4\.8, but 3\.6\.0 is installed: upgrade datasets"):
        RowStream(datasets.IterableDataset.from_generator(lambda: iter([])))
