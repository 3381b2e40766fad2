"""Answers to the image as it is, which move with the augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_detrkd.answers import AnswerWriter, StoredAnswers
from hf_detrkd.answers.columns import LOWEST, moved_columns
from hf_detrkd.data import DetectionDataset, DetectionTransform
from hf_detrkd.data.frame import moved
from hf_detrkd.distillation.answering import Answering, answer_shards
from hf_detrkd.distillation.stored_teacher import StoredTeacher
from hf_detrkd.structures.outputs import Predictions
from tests.answers.stored import CLASSES, COLLATE, CPU, NAMES, SEED, build, dataset, methods_of, teacher_of
from tests.answers.test_equality import step_of


SPECIFIC = {"kd_detr": {"general_points": 0}}


MATCHED = {"detrdistill": {"feature_weight": 0.0}}


def stored_plain(
    folder: Path, family: str = "rt_detr", options: dict[str, Any] = SPECIFIC
) -> tuple[StoredAnswers, list, DetectionDataset]:
    """A teacher's answers to plain images, its methods, and the plain data set."""
    teacher, data = teacher_of(family), dataset().with_transform(DetectionTransform((96, 96)), views=1)
    methods = methods_of(build(family), teacher, **options)
    answering = Answering(teacher, methods, SEED, padded=False, moved=True)
    writer = AnswerWriter(folder, answering.manifest(data, COLLATE([data.view_of(0, 0)]), NAMES, "float32", 8))
    writer.begin()
    for _ in answer_shards(answering, data, writer, writer.missing(), 2, COLLATE, CPU):
        pass
    return StoredAnswers(folder), methods, data


@pytest.mark.parametrize("options", [SPECIFIC, MATCHED])
def test_an_unchanged_image_has_the_answers_of_the_teacher(tmp_path: Path, options: dict[str, Any]) -> None:
    family = "dab-detr"  # whose queries are boxes and nothing else
    answers, methods, plain = stored_plain(tmp_path, family, options)
    batch = COLLATE([plain.with_answers(answers)[index] for index in (1, 3)])
    student = build(family)
    live, _ = step_of(student, teacher_of(family), methods, batch, 0)
    found, _ = step_of(student, StoredTeacher(answers, CLASSES), methods, batch, 0)
    for key, value in live.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=str(key))


def test_places_and_predictions_move_and_what_is_out_of_view_has_no_score(tmp_path: Path) -> None:
    answers, methods, _ = stored_plain(tmp_path)
    assert answers.moved and {n for n in answers.manifest.columns if n.startswith("queries")} == {"queries/boxes"}
    data = dataset(views=None, max_scale=3.0).with_answers(answers)
    hidden = 0
    for epoch in range(4):
        data.set_epoch(epoch)
        for index in range(len(data)):
            item = data[index]
            still, found = answers.read(int(item["labels"]["image_id"]), 0), item["answers"]
            for name in ("layers/0", "queries"):
                boxes, visible = moved(still[f"{name}/boxes"], item["placed"])
                assert torch.equal(found[f"{name}/boxes"], boxes)
            _, visible = moved(still["layers/0/boxes"], item["placed"])
            unseen = visible < 0.25
            logits = found["layers/0/logits"]
            assert (logits[unseen] == LOWEST).all() and torch.equal(logits[~unseen], still["layers/0/logits"][~unseen])
            assert not Predictions(logits[None, unseen], boxes[None, unseen]).scores().any()
            hidden += int(unseen.sum())
    assert hidden > 10
    batch = COLLATE([data[0], data[2]])
    assert batch["view"] == 0
    losses, gradients = step_of(build("rt_detr"), StoredTeacher(answers, CLASSES), methods, batch, 0)
    assert all(value.isfinite() and value > 0 for value in losses.values())
    assert all(value.isfinite().all() for value in gradients.values())


def test_boxes_of_single_classes_leave_what_is_out_of_view_without_a_score() -> None:
    boxes = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.7, 0.7, 0.1, 0.1]])
    columns = {
        "layers/0/boxes": boxes,
        "layers/0/class_boxes": boxes[:, None].repeat(1, 3, 1),
        "layers/0/logits": torch.zeros(2, 4),
    }
    found = moved_columns(columns, torch.tensor([-1.0, -1.0, 2.0, 2.0]), "softmax", 0.25)  # the lower right quarter
    assert found["layers/0/logits"].tolist() == [[LOWEST] * 3 + [0.0], [0.0] * 4]
    torch.testing.assert_close(found["layers/0/class_boxes"][1], torch.tensor([[0.4, 0.4, 0.2, 0.2]] * 3))


def test_any_augmentation_fits_and_other_sizes_and_terms_do_not(tmp_path: Path) -> None:
    answers, methods, plain = stored_plain(tmp_path)
    there = StoredTeacher(answers, CLASSES)
    for data in (dataset(), dataset(views=None), dataset(views=2, photometric=0.0), plain):
        there.check(data, methods, None)
    with pytest.raises(ValueError, match=r"images\.size\.height is 96 in the answers and 64 in this run"):
        there.check(plain.with_transform(DetectionTransform((64, 96))), methods, None)
    student, teacher = build("rt_detr"), teacher_of("rt_detr")
    unweighted = methods_of(student, teacher, kd_detr={"general_points": 0, "foreground_weight": False})
    with pytest.raises(ValueError, match="reads more than the teacher's own predictions"):
        there.check(dataset(), unweighted, None)
    for options in ({"kd_detr": {}}, {"detrdistill": {}}, {"clockdistill": {}}):
        with pytest.raises(ValueError, match="Only the teacher's own predictions can move"):
            Answering(teacher, methods_of(student, teacher, **options), SEED, padded=False, moved=True)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_predictions_without_a_score_take_no_part_in_detrdistill(tmp_path: Path, variant: str) -> None:
    """The loss is that of a teacher which has only the queries that the view shows."""
    options = {"detrdistill": {"feature_weight": 0.0, "assignment_weight": 0.0, "variant": variant}}
    answers, methods, plain = stored_plain(tmp_path, options=options)
    batch = COLLATE([plain.with_answers(answers)[index] for index in (1, 3)])
    shown = 4
    hidden, fewer = dict(batch), dict(batch)
    for name, values in batch.items():
        if name.startswith("answers/"):
            hidden[name], fewer[name] = values.clone(), values[:, :shown]
            hidden[name][:, shown:] = LOWEST if name.endswith("logits") else 0.01
    student = build("rt_detr")
    found, wanted = (step_of(student, StoredTeacher(answers, CLASSES), methods, one, 0)[0] for one in (hidden, fewer))
    pairs = student.config.num_queries if variant == "released" else 1  # divisors count all pairs
    for key, value in wanted.items():
        if variant == "paper" and key.group == "negative":
            continue
        scale = shown / pairs if variant == "released" else 1.0
        torch.testing.assert_close(found[key], scale * value, rtol=1e-4, atol=1e-6, msg=str(key))
