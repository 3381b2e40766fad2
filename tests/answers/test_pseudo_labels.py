"""A teacher's stored detections in place of labels that nobody has made."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_detrkd.answers import AnswerWriter, StoredAnswers
from hf_detrkd.answers.pseudo_labels import PseudoLabels, confident
from hf_detrkd.data import DetectionDataset
from hf_detrkd.distillation.answering import Answering, answer_shards
from hf_detrkd.distillation.distiller import Distiller
from hf_detrkd.distillation.stored_teacher import StoredTeacher
from hf_detrkd.structures.outputs import Predictions
from hf_detrkd.structures.targets import Targets
from tests.answers.stored import CLASSES, COLLATE, CPU, NAMES, SEED, VIEWS, build, dataset, methods_of, teacher_of
from tests.answers.test_equality import compare, step_of
from tests.runs import without_labels


THRESHOLD = 0.697  # some of a random teacher's detections
UNKNOWN = (1, 3)


def test_confident_queries_in_their_order_with_their_best_class() -> None:
    scores = torch.tensor([[0.1, 0.6, 0.2], [0.49, 0.1, 0.1], [0.7, 0.2, 0.9], [0.2, 0.5, 0.1]])
    queries, classes, found = confident(scores.logit(), "sigmoid", 0.5)
    assert (queries.tolist(), classes.tolist()) == ([0, 2, 3], [1, 2, 1])
    torch.testing.assert_close(found, torch.tensor([0.6, 0.9, 0.5]))
    softmax = torch.tensor([[0.2, 0.3, 0.5], [0.55, 0.05, 0.4]]).log()  # the last column is no-object
    queries, classes, _ = confident(softmax, "softmax", 0.3)
    assert (queries.tolist(), classes.tolist()) == ([0, 1], [1, 0])


def test_of_the_repeated_boxes_of_a_faster_rcnn_the_best_is_kept() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.51, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]])
    scores = torch.tensor([[0.6, 0.1], [0.9, 0.0], [0.8, 0.1], [0.1, 0.7]])
    columns = {"layers/0/logits": scores.logit(eps=1e-6), "layers/0/boxes": boxes}
    for one_to_one, count in ((True, 4), (False, 3)):
        labels, _ = PseudoLabels(0.5, [0, 1], "sigmoid", "layers/0", frozenset(), True, one_to_one)(columns)
        assert len(labels["boxes"]) == count
    assert labels["class_labels"].tolist() == [0, 0, 1]
    torch.testing.assert_close(labels["boxes"], boxes[1:])


@pytest.mark.parametrize("hard", [False, True])
def test_labels_have_the_student_s_classes_and_the_answers_their_entries(hard: bool) -> None:
    logits = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.1, 0.8], [0.1, 0.7, 0.1], [0.2, 0.2, 0.3]]).logit()
    columns = {
        "layers/1/logits": logits,
        "layers/1/boxes": torch.arange(16.0).view(4, 4),
        "decoded/clockdistill/targets/0/logits": torch.tensor([[0.0], [1.0], [2.0]]),  # one per detection
    }
    made = PseudoLabels(
        0.5, [1, -1, 0], "sigmoid", "layers/1", frozenset({"decoded/clockdistill/targets/0/logits"}), hard
    )
    labels, answers = made(columns)  # the student does not know the teacher's class 1
    assert labels["class_labels"].tolist() == [1, 0] and labels["labeled"] is hard
    assert labels["boxes"].tolist() == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]
    assert answers["decoded/clockdistill/targets/0/logits"].tolist() == [[0.0], [1.0]]
    assert torch.equal(answers["layers/1/logits"], logits)


def answered(folder: Path, teacher: Any, methods: Any, data: DetectionDataset, precision: str) -> StoredAnswers:
    answering = Answering(teacher, methods, SEED, padded=False, pseudo_threshold=THRESHOLD)
    manifest = answering.manifest(data, COLLATE([data.view_of(0, 0)]), NAMES, precision, 4)
    writer = AnswerWriter(folder, manifest)
    writer.begin()
    for _ in answer_shards(answering, data, writer, writer.missing(), 2, COLLATE, CPU):
        pass
    return StoredAnswers(folder)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("options", [{"kd_detr": {"general_points": 7}}, {"detrdistill": {}}, {"clockdistill": {}}])
def test_losses_equal_those_of_the_teacher_with_its_detections_as_ground_truth(
    tmp_path: Path, options: dict[str, Any], precision: str
) -> None:
    student, teacher = build("rt_detr"), teacher_of("rt_detr")
    data, methods = without_labels(dataset(), UNKNOWN), methods_of(student, teacher, **options)
    answers = answered(tmp_path, teacher, methods, data, precision)
    there = StoredTeacher(answers, CLASSES)
    there.check(data, methods, pseudo_threshold=THRESHOLD)
    read, places = data.with_answers(there.labeling(THRESHOLD, hard=False)), (0, 3, 1)
    batch = COLLATE([read.view_of(index, VIEWS - 1) for index in places])
    # The oracle: the same images, and the teacher's detections on them.
    plain = COLLATE([data.view_of(index, VIEWS - 1) for index in places])
    output = teacher(plain["pixel_values"])
    for row in (1, 2):
        logits = output.layers[-1].logits[row].to(getattr(torch, precision)).float()
        queries = (logits.sigmoid().amax(-1) >= THRESHOLD).nonzero()[:, 0]
        assert 0 < len(queries) < len(logits)
        boxes, classes = output.layers[-1].boxes[row][queries], logits.argmax(-1)[queries]
        torch.testing.assert_close(batch["labels"][row]["boxes"], boxes)
        assert torch.equal(batch["labels"][row]["class_labels"], classes)
        plain["labels"][row] |= {"boxes": boxes, "class_labels": classes}
    live = step_of(student, teacher, methods, plain, VIEWS - 1)
    found = step_of(student, there, methods, batch, VIEWS - 1)
    compare(live, found, tolerance=1e-5 if precision == "float32" else 2e-3)


def task_of(distiller: Distiller, batch: dict[str, Any]) -> dict[str, float]:
    torch.manual_seed(0)  # denoising draws random numbers
    return {name: float(value.detach().sum()) for name, value in distiller.losses(batch).task.items()}


def test_the_detection_loss_sees_pseudo_labels_only_if_they_are_hard(tmp_path: Path) -> None:
    student, teacher = build("rt_detr").eval(), teacher_of("rt_detr")
    data, methods = without_labels(dataset(), UNKNOWN), methods_of(student, teacher, kd_detr={"general_points": 0})
    there = StoredTeacher(answered(tmp_path, teacher, methods, data, "float32"), CLASSES)
    soft, hard = (
        COLLATE([data.with_answers(there.labeling(THRESHOLD, kind)).view_of(i, 0) for i in (0, 1)])
        for kind in (False, True)
    )
    distiller = Distiller(student, there, methods)
    others = copy.deepcopy(soft)
    others["labels"][1] |= {"boxes": torch.rand(4, 4), "class_labels": torch.zeros(4, dtype=torch.long)}
    assert task_of(distiller, soft) == task_of(distiller, others)
    empty = copy.deepcopy(soft)
    empty["labels"][1] = {name: empty["labels"][1][name][:0] for name in ("boxes", "class_labels")}
    assert task_of(distiller, empty) != task_of(distiller, soft) != task_of(distiller, hard)
    assert Targets.from_labels(soft["labels"]).counts == Targets.from_labels(hard["labels"]).counts


def test_another_threshold_is_refused_where_the_teacher_was_asked_at_its_detections(tmp_path: Path) -> None:
    student, teacher = build("rt_detr"), teacher_of("rt_detr")
    data, methods = without_labels(dataset(), UNKNOWN), methods_of(student, teacher, clockdistill={})
    there = StoredTeacher(answered(tmp_path, teacher, methods, data, "float32"), CLASSES)
    words = r"questions\.clockdistill\.pseudo_threshold is 0\.697 in the answers and 0\.7 in this run"
    with pytest.raises(ValueError, match=words):
        there.check(data, methods, pseudo_threshold=0.7)
    with pytest.raises(ValueError, match="answers none to offer"):
        data.with_answers(there.answers).view_of(UNKNOWN[0], 0)


def test_the_pass_removes_the_duplicates_that_reading_removes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two boxes with an IoU of about a half, which 16 bits would change; boxes are stored in 32."""
    teacher = teacher_of("rt_detr")
    monkeypatch.setattr(teacher.adapter, "spec", dataclasses.replace(teacher.adapter.spec, one_to_one=False))
    methods = methods_of(build("rt_detr"), teacher, clockdistill={})
    answering = Answering(teacher, methods, SEED, padded=False, pseudo_threshold=0.1)
    boxes = torch.tensor([[0.4, 0.5, 0.3, 0.3]]).repeat(200, 2, 1)
    boxes[:, 1, 0] += 0.1 + torch.linspace(-1e-4, 1e-4, 200)  # an IoU of a half at 0.1
    logits = torch.tensor([[2.0], [1.0]]).repeat(200, 1, 1)
    label = {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4), "labeled": False}
    passed = answering._labels([label] * 200, Predictions(logits, boxes), torch.float16)
    made = PseudoLabels(0.1, [0], "sigmoid", "layers/0", frozenset(), False, one_to_one=False)
    read = [made({"layers/0/logits": logits[i].half(), "layers/0/boxes": boxes[i]})[0] for i in range(200)]
    counts = [len(one["boxes"]) for one in passed]
    assert counts == [len(one["boxes"]) for one in read] and set(counts) == {1, 2}


def test_the_pass_takes_the_detections_that_will_be_read(tmp_path: Path) -> None:
    """A score just below the threshold may be above it in 16 bits, and the answers have an entry for each."""
    teacher = teacher_of("rt_detr")
    methods = methods_of(build("rt_detr"), teacher, clockdistill={})
    exact = torch.tensor([0.5003, 1.0, -1.0])  # in 16 bits 0.5005
    rounded = exact.half().float()
    threshold = float((exact[0] + rounded[0]).div(2).sigmoid())
    answering = Answering(teacher, methods, SEED, padded=False, pseudo_threshold=threshold)
    found = Predictions(exact[None, :, None], torch.rand(1, 3, 4))
    label = {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4), "labeled": False}
    for stored, count in ((torch.float32, 1), (torch.float16, 2)):
        (made,) = answering._labels([label], found, stored)
        queries, _, _ = confident(exact.to(stored)[:, None], "sigmoid", threshold)
        assert len(made["boxes"]) == len(queries) == count
