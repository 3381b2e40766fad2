"""Several teachers with stored answers, each of which teaches the classes that it knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hf_detrkd.answers import StoredAnswers
from hf_detrkd.answers.merged import MergedAnswers, part_of
from hf_detrkd.answers.reader import METRICS
from hf_detrkd.cli import answer, distill
from hf_detrkd.distillation.merged_teacher import MergedTeacher, as_sigmoid, beside, best_members, mean_of
from hf_detrkd.distillation.stored_teacher import StoredTeacher
from hf_detrkd.structures.outputs import Predictions
from tests.answers.stored import CLASSES, COLLATE, VIEWS, build, dataset, methods_of, stored, teacher_of
from tests.answers.test_command import results, words  # noqa: F401
from tests.answers.test_equality import POINTS, compare, step_of


FIRST = {name: name for name in CLASSES[:2]} | dict.fromkeys(CLASSES[2:])
SECOND = dict.fromkeys(CLASSES[:2]) | {name: name for name in CLASSES[2:]}


def predictions(scores: list, boxes: list | None = None, known: list | None = None) -> Predictions:
    """Those for one image; scores `(num_queries, num_classes)`."""
    logits = torch.tensor([scores]).logit()
    places = torch.tensor([boxes or [[0.5, 0.5, 0.2, 0.2]] * len(scores)])
    return Predictions(logits, places, known=None if known is None else torch.tensor(known))


def test_queries_stand_side_by_side_with_what_their_teacher_knows() -> None:
    one = predictions([[0.9, 0.5], [0.1, 0.5]], known=[True, False])
    merged = beside([one, predictions([[0.3, 0.6]])])
    assert merged.logits.shape == (1, 3, 2) and merged.boxes.shape == (1, 3, 4) and merged.known is not None
    assert merged.known.tolist() == [[[True, False], [True, False], [True, True]]]
    assert beside([predictions([[0.3, 0.6]])] * 2).known is None


def test_heads_of_two_kinds_are_compared_by_their_scores() -> None:
    softmax = Predictions(torch.tensor([[[0.2, 0.5, 0.3]]]).log(), torch.rand(1, 1, 4), activation="softmax")
    torch.testing.assert_close(as_sigmoid(softmax).scores(), torch.tensor([[[0.2, 0.5]]]))
    merged = beside([softmax, predictions([[0.3, 0.6]])])
    assert merged.activation == "sigmoid"
    torch.testing.assert_close(merged.scores(), torch.tensor([[[0.2, 0.5], [0.3, 0.6]]]))


def test_answers_to_the_same_queries_have_mean_scores_and_the_surest_box() -> None:
    here, there = [0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]
    one = predictions([[0.8, 0.2, 0.5], [0.1, 0.1, 0.5]], [here, here], [True, True, False])
    other = predictions([[0.4, 0.5, 0.9], [0.3, 0.5, 0.2]], [there, there], [True, False, False])
    merged = mean_of([one, other])
    assert merged.known is not None and merged.known.tolist() == [True, True, False]
    scores = torch.tensor([[[0.6, 0.2, 0.0], [0.2, 0.1, 0.0]]])  # the other one knows nothing of class 1
    torch.testing.assert_close(merged.scores(), scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged.boxes, torch.tensor([[here, there]]))
    assert mean_of([one, predictions([[0.4, 0.5, 0.9], [0.3, 0.5, 0.2]])]).known is None


@pytest.fixture
def answers(tmp_path: Path) -> StoredAnswers:
    teacher = teacher_of("rt_detr")
    return stored(tmp_path / "answers", teacher, methods_of(build("rt_detr"), teacher, kd_detr=POINTS), dataset())


def batch_of(answers: Any) -> dict[str, Any]:
    read = dataset().with_answers(answers)
    return COLLATE([read.view_of(index, VIEWS - 1) for index in (3, 0, 4)])


def split_in_two(answers: StoredAnswers) -> MergedTeacher:
    return MergedTeacher([StoredTeacher(answers, CLASSES, FIRST), StoredTeacher(answers, CLASSES, SECOND)], "mean")


@pytest.mark.parametrize("gate", ["none", "better"])
def test_a_teacher_split_by_class_answers_general_points_as_the_whole(answers: StoredAnswers, gate: str) -> None:
    whole, halves = StoredTeacher(answers, CLASSES), split_in_two(answers)
    options = {"kd_detr": POINTS | {"specific_points": False, "class_loss": "bce", "gate": gate}}
    student = build("rt_detr")
    methods = methods_of(student, halves, **options)
    wanted = step_of(student, whole, methods, batch_of(whole.answers), VIEWS - 1)
    found = step_of(student, halves, methods, batch_of(halves.answers), VIEWS - 1)
    compare(wanted, found, tolerance=1e-4)  # scores and back


def test_specific_points_teach_only_the_classes_of_their_teacher(answers: StoredAnswers) -> None:
    """The oracle: each half alone, weighted by its share of the scores."""
    halves = split_in_two(answers)
    options = {"kd_detr": {"general_points": 0, "class_loss": "bce"}}
    student = build("rt_detr")
    methods = methods_of(student, halves, **options)
    batch = {name: value[:1] if name != "view" else value for name, value in batch_of(halves.answers).items()}
    found, _ = step_of(student, halves, methods, batch, VIEWS - 1)
    alone, weights = [], []
    for number, member in enumerate(halves.members):
        plain = {name: value for name, value in batch.items() if not name.startswith("answers/")}
        columns = part_of(
            {n.removeprefix("answers/"): v for n, v in batch.items() if n.startswith("answers/")}, number
        )
        one = plain | {f"answers/{name}": value for name, value in columns.items()}
        alone.append(step_of(student, member, methods_of(student, member, **options), one, VIEWS - 1)[0])
        weights.append(float(member.of(one).layers[-1].scores().amax(-1).sum()))
    for key, value in found.items():
        mean = sum(w * losses[key] for w, losses in zip(weights, alone, strict=True)) / sum(weights)
        torch.testing.assert_close(value, mean, rtol=0.1, atol=1e-3, msg=str(key))  # queries attend to each other


def test_the_best_teacher_of_a_class_teaches_it(answers: StoredAnswers, tmp_path: Path) -> None:
    figures = [[0.5, 0.2, 0.3, 0.1, 0.9, 0.4], [0.4, 0.2, 0.6, 0.2, 0.1, 0.4]]
    members = []
    for number, values in enumerate(figures):
        one = StoredTeacher(answers, CLASSES, {CLASSES[5]: None} if number == 0 else None)
        one.stored_metrics = lambda values=values: {
            f"teacher_map_{n}": v for n, v in zip(CLASSES, values, strict=True)
        }
        members.append(one)
    taught = [[column is not None for column in member.class_map.columns] for member in best_members(members)]
    assert taught == [[True, True, False, False, True, False], [False, False, True, True, False, True]]
    members[1].stored_metrics = dict
    with pytest.raises(ValueError, match="compares the teachers' AP of each class, but the answers in"):
        best_members(members)
    members[1].stored_metrics = lambda: {f"teacher_map_{name}": 0.0 for name in CLASSES[:5]} | {"teacher_map_x": 0}
    with pytest.raises(ValueError, match=rf"have none for '{CLASSES[5]}'"):
        best_members(members)
    members[1].stored_metrics = lambda: {f"teacher_map_{name}": 0.0 for name in CLASSES}
    members[0].stored_metrics = lambda: {f"teacher_map_{name}": 0.1 for name in CLASSES}
    members[0].class_map = members[1].class_map
    with pytest.raises(ValueError, match="is best in no class: leave it out"):
        best_members(members)


def test_labels_of_several_teachers_have_each_object_once(answers: StoredAnswers) -> None:
    member = StoredTeacher(answers, CLASSES)
    twice = MergedTeacher([member, StoredTeacher(answers, CLASSES)], "mean").labeling(0.6, hard=True)
    image = int(answers.image_ids[0])
    alone, _ = member.labeling(0.6, hard=True).as_labels(answers.read(image, 0))
    merged, columns = twice.as_labels(twice.read(image, 0))
    assert merged["labeled"] is True and 0 < len(merged["boxes"]) <= len(alone["boxes"])
    assert {tuple(box) for box in merged["boxes"].tolist()} <= {tuple(box) for box in alone["boxes"].tolist()}
    assert columns.keys() == twice.read(image, 0).keys()


def test_answers_that_do_not_go_together_are_refused(answers: StoredAnswers) -> None:
    halves, student = split_in_two(answers), build("rt_detr")
    for options in ({"detrdistill": {"feature_weight": 0.0}}, {"kd_detr": {"teacher_layers": "each"}}):
        whole = methods_of(student, teacher_of("rt_detr"), **options)
        with pytest.raises(ValueError, match="Several teachers can teach kd_detr, with the teacher's last layer"):
            halves.check(dataset(), whole)
    other = StoredTeacher(answers, CLASSES)
    other.answers = StoredAnswers(answers.folder)
    vars(other.answers)["manifest"] = type(answers.manifest)(**vars(answers.manifest) | {"seed": 99})
    with pytest.raises(ValueError, match="must have the same --augmentation_seed"):
        MergedTeacher([halves.members[0], other], "mean")
    moved = StoredAnswers(answers.folder)
    vars(moved)["manifest"] = type(answers.manifest)(
        **vars(answers.manifest) | {"images": answers.manifest.images | {"form": "moved"}}
    )
    with pytest.raises(ValueError, match="must have the same --answers_form"):
        MergedAnswers([answers, moved])


def test_two_specialists_teach_one_student(tmp_path: Path, words: list[str]) -> None:  # noqa: F811
    for name, classes in (("first", FIRST), ("second", SECOND)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(classes))
        answer.main([*words, "--teacher_answers", str(tmp_path / name), "--class_map", str(tmp_path / f"{name}.yaml")])
    both = [*words, "--teacher_answers", f"{tmp_path}/first,{tmp_path}/second"]
    maps = f"{tmp_path}/first.yaml,{tmp_path}/second.yaml"
    distill.main([*both, "--class_map", maps])
    summary = results(tmp_path / "out")
    assert list(summary) == ["teacher 1", "teacher 2", "distilled"]
    assert (
        summary["teacher 1"]["map"] == json.loads((tmp_path / "first" / METRICS).read_text())["metrics"]["teacher_map"]
    )
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["teacher"]["name"] == "teacher + teacher"
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    for part in ("kd_detr_class_specific", "kd_detr_class_general"):
        assert any(entry.get(part, 0) > 0 for entry in state["log_history"])
    distill.main([*both, "--class_map", maps, "--teacher_merge", "best", "--overwrite_output_dir"])
    named = [word for word in words if word != str(tmp_path / "teacher")]
    place = named.index("--teacher_model_name_or_path") + 1
    models = [*named[:place], f"{tmp_path}/teacher,{tmp_path}/teacher", *named[place:], "--class_map", maps]
    distill.main([*models, "--teacher_answers", "auto", "--output_dir", str(tmp_path / "auto")])
    assert [len(StoredAnswers(tmp_path / "auto" / "answers" / number)) for number in "12"] == [12, 12]
    with pytest.raises(ValueError, match="teach by stored answers: set --teacher_answers auto"):
        distill.main([*models, "--output_dir", str(tmp_path / "live")])
    with pytest.raises(ValueError, match="class_map must name one file for each of 2 teacher_answers, got 1"):
        distill.main([*both, "--class_map", str(tmp_path / "first.yaml"), "--output_dir", str(tmp_path / "one")])
