"""Indices of COCO files: equal to the JSON, never in the way of it, and whole."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError

from hf_detrkd.data import load_detection_split, load_detection_splits
from hf_detrkd.data.layouts import coco, coco_index


BIG = 2**62 + 1


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, in which also small and new files have an index."""
    monkeypatch.setattr(coco_index, "LEAST", 0)
    monkeypatch.setattr(coco_index, "TICK", 0.0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "hf_detrkd_coco"


def content():
    """Category ids with gaps, image ids that no double holds, names of any script, and boxes of every kind."""
    names = ["süß/猫 1.png", "b.png", "empty.png"]
    boxes = [
        (BIG, 90, [1.5, 2.25, 10, 10], 0, 77.5),
        (3, 4, [-5, -5, 20, 20], 0, None),
        (BIG, 17, [0, 0, 40, 15], 1, 600),
    ]
    boxes += [(3, 90, [60, 70, 5, 5], 0, 9), (BIG, 4, [0, 0, 0.5, 40.0], 0, 20), (3, 90, [2, 2, 4, 4], 1, 16)]
    return {
        "images": [
            {"id": i, "file_name": n, "width": 40, "height": 30} for i, n in zip((BIG, 3, 5), names, strict=True)
        ],
        "annotations": [
            {"image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd, "segmentation": [[1, 2, 3]]}
            | ({} if area is None else {"area": area})
            for image, category, box, crowd, area in boxes
        ],
        "categories": [{"id": 90, "name": "зебра"}, {"id": 4, "name": "ant"}, {"id": 17, "name": "猫 \ud800"}],
    }


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "data"
    (place / "annotations").mkdir(parents=True)
    for image in content()["images"]:
        (place / "val" / image["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(place / "val" / image["file_name"])
    write(place, content())
    return place


def write(folder, what):
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(what))


def described(folder, caplog):
    """Everything that a data set says of itself, and the warnings of its reading."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        dataset = load_detection_split(folder)
    records = [
        (one.image_id, one.name, one.width, one.height, one.fingerprint, one.load().size) for one in dataset.records
    ]
    columns = [
        (values.dtype, values.tolist())
        for one in dataset.records
        for values in (one.boxes, one.categories, one.area, one.iscrowd)
    ]
    messages = [entry.getMessage() for entry in caplog.records]
    return (
        records,
        columns,
        dataset.classes,
        dataset.category_ids,
        dataset.repaired,
        dataset.coco_ground_truth(),
        messages,
    )


@pytest.fixture
def no_json(monkeypatch):
    def switch_off():
        def refuse(path):
            raise AssertionError(f"{path} was read")

        monkeypatch.setattr(coco, "read_json", refuse)

    return switch_off


def test_an_index_says_all_that_its_json_says(folder, caplog, cache, no_json):
    first = described(folder, caplog)
    assert len(list(cache.iterdir())) == 1
    no_json()
    assert described(folder, caplog) == first
    records, _, classes, category_ids, repaired, _, messages = first
    assert [record[0] for record in records] == [BIG, 3, 5]
    assert classes == ["ant", "猫 \ud800", "зебра"] and category_ids == [4, 17, 90]
    assert (repaired.boxes, repaired.dropped, repaired.clipped) == (6, 1, 2)
    assert len(messages) == 1 and "6 boxes: dropped 1" in messages[0]


def test_relative_boxes_are_warned_of_from_the_index(folder, caplog, no_json):
    what = content()
    for entry in what["annotations"]:
        entry["bbox"] = [0.1, 0.2, 0.5, 0.5]
    write(folder, what)
    first = described(folder, caplog)
    no_json()
    assert described(folder, caplog) == first
    assert "are the boxes relative to the image?" in first[-1][0]


def test_a_changed_file_is_read_again_and_has_one_index(folder, caplog, cache):
    load_detection_split(folder)
    before = set(cache.iterdir())
    what = content()
    what["annotations"][0]["bbox"] = [3, 3, 7, 7]
    write(folder, what)
    assert load_detection_split(folder).records[0].boxes[0].tolist() == [3, 3, 7, 7]
    after = set(cache.iterdir())
    assert len(after) == 1 and not after & before


def test_another_content_of_the_same_size_and_time_is_read_again(folder):
    file = folder / "annotations" / "instances_val.json"
    load_detection_split(folder)
    time = file.stat().st_mtime_ns
    text = file.read_text()
    file.write_text(text.replace("2.25", "2.75"))
    os.utime(file, ns=(time, time))
    assert load_detection_split(folder).records[0].boxes[0].tolist() == [1.5, 2.75, 10, 10]


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text"])
def test_a_damaged_index_is_made_again_in_silence(folder, caplog, cache, damage, no_json):
    first = described(folder, caplog)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    bad = bytearray(good)
    bad[-len(good) // 3] ^= 1
    file.write_bytes({"cut": good[:-100], "bit": bytes(bad), "empty": b"", "text": b"no index" * 99}[damage])
    assert described(folder, caplog) == first
    assert file.read_bytes() == good
    no_json()
    assert described(folder, caplog) == first


def test_a_cache_that_cannot_be_written_to_is_no_error(folder, caplog, cache):
    cache.parent.write_text("a file where the folder would be")
    first = described(folder, caplog)
    assert described(folder, caplog) == first and len(first[-1]) == 1


def test_a_full_disk_is_no_error_and_leaves_nothing(folder, caplog, cache, monkeypatch):
    def fill(arrays, file, metadata):
        file.write_bytes(b"the first bytes")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(coco_index, "save_file", fill)
    first = described(folder, caplog)
    assert described(folder, caplog) == first and not list(cache.iterdir())


def test_missing_images_are_those_of_now(folder, cache, no_json):
    load_detection_split(folder)
    no_json()
    (folder / "val" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"has 1 problem .* the image file .*b\.png does not exist"):
        load_detection_split(folder)
    assert len(load_detection_split(folder, skip_unreadable_images=True)) == 2


def test_files_that_are_small_or_too_new_or_measure_their_images_have_no_index(folder, cache, monkeypatch):
    for name, value in (("LEAST", 10**6), ("TICK", 3600.0)):
        with monkeypatch.context() as patch:
            patch.setattr(coco_index, name, value)
            load_detection_split(folder)
    what = content()
    del what["images"][0]["width"], what["images"][0]["height"]
    write(folder, what)
    load_detection_split(folder)
    assert not cache.exists()


def test_a_single_file_for_both_splits_is_read_once_with_an_index(folder, monkeypatch):
    (folder / "annotations" / "instances_val.json").rename(folder / "result.json")
    (folder / "annotations").rmdir()
    (folder / "val").rename(folder / "images")
    read, read_json = [], coco.read_json
    monkeypatch.setattr(coco, "read_json", lambda path: read.append(path) or read_json(path))
    load_detection_splits(folder)
    assert len(read) == 2, "to see whether it is COCO, and to read it"
    load_detection_splits(folder)
    assert len(read) == 2


def write_often(file: Path, cache: Path, start) -> None:
    """A process that reads and writes an index."""
    datasets.config.HF_DATASETS_CACHE = cache.parent
    index = coco_index.index_of(file)
    known = index.read()
    start.wait(30)
    for _ in range(40):
        index.write(known)
        again = index.read()
        assert again is not None and np.array_equal(again.arrays["boxes"], known.arrays["boxes"])


def test_processes_that_write_at_once_leave_a_whole_index(folder, caplog, cache, no_json):
    first = described(folder, caplog)
    fork = multiprocessing.get_context("fork")
    start, file = fork.Barrier(3), folder / "annotations" / "instances_val.json"
    processes = [fork.Process(target=write_often, args=(file, cache, start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(cache.iterdir())) == 1
    no_json()
    assert described(folder, caplog) == first
