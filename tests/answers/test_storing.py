"""Files of answers: who reads what, what does not fit, and what a stopped series leaves."""

from __future__ import annotations

import dataclasses
import itertools
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_detrkd.answers import AnswerWriter, Manifest, StoredAnswers, first_difference
from hf_detrkd.data import DetectionTransform
from hf_detrkd.distillation.answering import Answering, answer_shards, batches_of
from hf_detrkd.distillation.stored_teacher import StoredTeacher
from hf_detrkd.distillation.teacher import Teacher
from tests.answers.stored import (
    CLASSES,
    COLLATE,
    CPU,
    IMAGES,
    SEED,
    VIEWS,
    build,
    dataset,
    methods_of,
    stored,
    teacher_of,
)


POINTS = {"kd_detr": {"general_points": 4}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder of answers, the methods and the teacher."""
    folder, teacher = tmp_path_factory.mktemp("answers"), teacher_of("rt_detr")
    methods = methods_of(build("rt_detr"), teacher, **POINTS)
    stored(folder, teacher, methods, dataset())
    return folder, methods, teacher


def tables(folder: Path) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    answers = StoredAnswers(folder)
    return {(i, v): answers.read(i, v) for i, v in itertools.product(answers.image_ids.tolist(), range(VIEWS))}


def equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(values, other[key][name]) for key, row in one.items() for name, values in row.items()
    )


def test_every_view_of_every_image_has_its_own_row(made: Any) -> None:
    folder, methods, teacher = made
    answering, data = Answering(teacher, methods, SEED, padded=False), dataset()
    rows = tables(folder)
    assert len(rows) == IMAGES * VIEWS == len(StoredAnswers(folder))
    for (index, record), view in itertools.product(enumerate(data.records), range(VIEWS)):
        (row,) = answering.rows(COLLATE([data.view_of(index, view)]), torch.float32)
        for name, values in rows[record.image_id, view].items():
            np.testing.assert_allclose(values.numpy(), row[name], atol=1e-5, err_msg=name)
    flat = torch.stack([row["layers/0/boxes"].flatten() for row in rows.values()])
    distances = torch.cdist(flat, flat) + torch.eye(len(flat))
    assert distances.min() > 1e-4  # no two are alike: a wrong row would be seen


def test_items_have_the_answers_to_what_they_show_in_every_epoch_and_order(made: Any) -> None:
    folder, _, _ = made
    answers, rows = StoredAnswers(folder), tables(folder)
    data = dataset().with_answers(answers)
    plain = dataset()
    for chosen in (data, data.select([4, 1]), data.select([3])):
        for epoch in (0, 1, 2, 3, 7, 11):
            chosen.set_epoch(epoch)
            for item in (chosen[index] for index in range(len(chosen))):
                image, view = int(item["labels"]["image_id"]), item["view"]
                assert view == epoch % VIEWS
                assert all(torch.equal(v, rows[image, view][name]) for name, v in item["answers"].items())
                places = [record.image_id for record in plain.records]
                assert torch.equal(item["pixel_values"], plain.view_of(places.index(image), view)["pixel_values"])


@pytest.mark.parametrize(("image", "view"), [(0, VIEWS), (0, -1), (10**6, 0), (-1, 0)])
def test_a_row_that_is_not_there_is_an_error_and_never_another(made: Any, image: int, view: int) -> None:
    with pytest.raises(ValueError, match="have no row for view"):
        StoredAnswers(made[0]).read(image, view)


CHANGES = {
    "images.augmentation.max_scale is 1.2 in the answers and 1.3 in this run": {"max_scale": 1.3},
    "images.augmentation.photometric is 0.5 in the answers and 0.0 in this run": {"photometric": 0.0},
    "images.views is 3 in the answers and 2 in this run": {"views": 2},
    "lack 1 of 6 training images, such as that with the id": {"images": IMAGES + 1},
}


@pytest.mark.parametrize("words", CHANGES)
def test_other_images_are_refused_by_the_first_difference(made: Any, words: str) -> None:
    folder, methods, _ = made
    with pytest.raises(ValueError, match=re.escape(words)):
        StoredTeacher(StoredAnswers(folder), CLASSES).check(dataset(**CHANGES[words]), methods, None)


def test_other_sizes_seeds_questions_and_columns_are_refused(made: Any) -> None:
    folder, methods, teacher = made
    there, data, student = StoredTeacher(StoredAnswers(folder), CLASSES), dataset(), build("rt_detr")
    there.check(data, methods, None)
    there.check(data.select([0, 2]), methods, None, "somewhere/rt_detr")  # fewer images fit
    larger = DetectionTransform((128, 96), augmentation=data.transform.augmentation)
    with pytest.raises(ValueError, match=r"images\.size\.height is 96 in the answers and 128 in this run"):
        there.check(data.with_transform(larger, SEED, VIEWS), methods, None)
    with pytest.raises(ValueError, match=rf"images\.seed is {SEED} in the answers and 12 in this run"):
        there.check(data.with_transform(data.transform, 12, VIEWS), methods, None)
    with pytest.raises(ValueError, match=r"images\.teacher_image_size is None in the answers and 128 in this run"):
        there.check(data, methods, "128")
    more = methods_of(student, teacher, kd_detr={"general_points": 5})
    with pytest.raises(ValueError, match=r"questions\.kd_detr\.general\.points is 4 in the answers and 5 in this run"):
        there.check(data, more, None)
    fewer = methods_of(student, teacher, clockdistill={"memory_weight": 0.0})
    with pytest.raises(ValueError, match=r"questions\.clockdistill\.targets is None in the answers and"):
        there.check(data, fewer, None)
    other = methods_of(student, teacher, detrdistill={"feature_weight": 0.0})
    with pytest.raises(ValueError, match=r"detrdistill needs the column layers/\d/logits, which the answers in"):
        there.check(data, other, None)
    unasked = methods_of(student, teacher, kd_detr={"general_points": 4, "content": "teacher"})
    with pytest.raises(ValueError, match="kd_detr needs the column queries/content, which the answers in"):
        there.check(data, unasked, None)
    with pytest.raises(ValueError, match="need a DetectionDataset with a transform as train_dataset, got list"):
        there.check([1, 2], methods, None)


def test_the_same_ids_with_other_annotations_or_names_are_other_images(made: Any) -> None:
    folder, methods, _ = made
    there, data = StoredTeacher(StoredAnswers(folder), CLASSES), dataset()
    records = list(data.records)
    fewer = dataclasses.replace(records[1], boxes=records[1].boxes[1:], categories=records[1].categories[1:])
    fewer = dataclasses.replace(fewer, area=records[1].area[1:], iscrowd=records[1].iscrowd[1:])
    for changed in (
        fewer,
        dataclasses.replace(records[1], name="other.png"),
        dataclasses.replace(records[1], width=7),
    ):
        data.records = [records[0], changed, *records[2:]]
        with pytest.raises(
            ValueError, match="lack 1 of 5 training images, such as that with the id 1, or had another"
        ):
            there.check(data, methods, None)
    swapped = [dataclasses.replace(one, image_id=4 - one.image_id) for one in records]
    data.records = swapped
    with pytest.raises(ValueError, match="lack 4 of 5 training images"):
        there.check(data, methods, None)


def test_another_teacher_by_name_is_refused(made: Any) -> None:
    folder, methods, _ = made
    there = StoredTeacher(StoredAnswers(folder), CLASSES)
    there.check(dataset(), methods, None, "any")  # of a teacher in memory no name is known
    facts = there.answers.manifest.teacher
    facts |= {"source": "folder", "name": "big"}
    there.check(dataset(), methods, None, "elsewhere/big")
    with pytest.raises(ValueError, match=r"teacher\.name is big in the answers and small in this run"):
        there.check(dataset(), methods, None, "elsewhere/small")


def test_methods_without_a_teacher_are_not_asked(made: Any) -> None:
    folder, methods, teacher = made
    both = [*methods, *methods_of(build("rt_detr"), teacher, extra_queries={})]
    StoredTeacher(StoredAnswers(folder), CLASSES).check(dataset(), both, None)


def test_files_have_about_a_size_and_at_least_a_row(made: Any) -> None:
    manifest = Manifest.read(made[0])
    size = manifest.bytes_per_row
    assert [manifest.with_files_of(n).shard for n in (1, 3 * size, 10**12)] == [1, 3, 256]


def test_a_manifest_that_is_no_json_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("")
    with pytest.raises(ValueError, match=r"is not readable .* delete the folder and make the answers again"):
        StoredAnswers(tmp_path)


def test_a_folder_without_all_files_or_without_any_is_refused(tmp_path: Path, made: Any) -> None:
    _, methods, teacher = made
    with pytest.raises(ValueError, match="holds no stored answers"):
        StoredAnswers(tmp_path)
    with pytest.raises(ValueError, match=r"1 of 4 files of answers in .* are missing, such as answers-00002-of-00004"):
        stored(tmp_path, teacher, methods, dataset(), numbers=[0, 1, 3])


def test_a_folder_of_other_answers_is_not_written_to(tmp_path: Path, made: Any) -> None:
    _, methods, teacher = made
    stored(tmp_path, teacher, methods, dataset())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds other answers: manifest.teacher.weights is .* Choose another folder"):
        stored(tmp_path, Teacher(build("rt_detr", seed=2), CLASSES), methods, dataset())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_stopped_series_goes_on_to_the_same_files(made: Any, tmp_path: Path, stop: int) -> None:
    whole, methods, teacher = made
    answering, data = Answering(teacher, methods, SEED, padded=False), dataset()
    writer = AnswerWriter(tmp_path, Manifest.read(whole))
    writer.begin()
    batches = answer_shards(answering, data, writer, writer.missing(), 2, COLLATE, CPU)
    for _ in range(stop):
        next(batches)
    batches.close()  # as a kill: what was not renamed is lost
    (tmp_path / f"answers-00003-of-00004.{socket.gethostname()}-99999999.tmp").write_text("half a file")
    (tmp_path / "answers-00003-of-00004.elsewhere-1.tmp").write_text("a file of a job on another machine")
    again = AnswerWriter(tmp_path, Manifest.read(whole))
    again.begin()
    left = again.missing()
    assert 0 < len(left) <= 4 and [file.name.split(".")[1] for file in tmp_path.glob("*.tmp")] == ["elsewhere-1"]
    for _ in answer_shards(answering, data, again, left, 2, COLLATE, CPU):
        pass
    assert equal(tables(tmp_path), tables(whole))


def test_two_processes_write_the_files_of_one(made: Any, tmp_path: Path) -> None:
    whole, methods, teacher = made
    data, manifest = dataset(), Manifest.read(whole)
    for process in (1, 0):
        writer = AnswerWriter(tmp_path, manifest)
        writer.begin()
        numbers = range(process, manifest.shards, 2)
        answering = Answering(teacher, methods, SEED, padded=False)
        for _ in answer_shards(answering, data, writer, numbers, 2, COLLATE, CPU):
            pass
    assert equal(tables(tmp_path), tables(whole))


def test_no_batch_has_two_views() -> None:
    found = batches_of(range(2, 13), images=5, size=3)
    assert found == [[2, 3, 4], [5, 6, 7], [8, 9], [10, 11, 12]]


def test_the_manifest_says_what_a_row_is_and_how_large(made: Any) -> None:
    folder, methods, _ = made
    manifest = Manifest.read(folder)
    spec = manifest.detector_spec()
    assert dataclasses.replace(spec, supervision=None) == dataclasses.replace(methods[0].teacher, supervision=None)
    queries, classes = spec.num_queries, spec.num_classes
    assert manifest.columns["layers/0/logits"] == {"dtype": "float32", "shape": [queries, classes]}
    assert manifest.columns["decoded/kd_detr/general/0/boxes"] == {"dtype": "float32", "shape": [4, 4]}
    numbers = sum(int(np.prod(column["shape"])) for column in manifest.columns.values())
    assert manifest.bytes_per_row == 4 * numbers
    assert not any("hidden_states" in name or "features" in name for name in manifest.columns)
    size = sum(file.stat().st_size for file in folder.glob("*.arrow"))
    assert numbers * 4 * manifest.rows < size < 1.5 * numbers * 4 * manifest.rows + 20_000


def test_padded_images_have_no_places_in_maps_and_no_maps(made: Any) -> None:
    _, _, teacher = made
    student = build("rt_detr")
    plain, padded = (
        Answering(teacher, methods_of(student, teacher, **POINTS), SEED, padded=padded) for padded in (False, True)
    )
    assert plain.parts.queries - padded.parts.queries == {"rows"}


@pytest.mark.parametrize(
    ("stored_value", "wanted", "words"),
    [
        ({"a": {"b": [1, 2]}}, {"a": {"b": (1, 2)}}, None),
        ({"a": {"b": 1}, "c": 2}, {"a": {"b": 2}, "c": 3}, "x.a.b is 1 in the answers and 2 in this run"),
        ({"a": 1, "more": 5}, {"a": 1}, "x.more is 5 in the answers and None in this run"),
    ],
)
def test_the_first_difference_is_named(stored_value: Any, wanted: Any, words: str | None) -> None:
    assert first_difference(stored_value, wanted, "x") == words
