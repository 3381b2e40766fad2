"""Classes paired by name, and class terms among those that both models know."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from hf_detrkd.adapters import adapter_for
from hf_detrkd.distillation.class_map import ClassMap, read_class_map
from hf_detrkd.distillation.distiller import Distiller
from hf_detrkd.distillation.teacher import Teacher
from hf_detrkd.losses.functional import among_known
from hf_detrkd.losses.matching import HungarianMatcher
from hf_detrkd.methods import KDDETR, METHODS, KDDETRConfig
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import tiny
from tests.methods.fakes import Fake, spec


# COCO's 91 rows: the person, the bicycle, ... with holes that the models call N/A.
COCO = ["N/A", "person", "bicycle", "car", "traffic light", *["N/A"] * 7, *(f"thing {i}" for i in range(79))]
NAMES = ["Traffic_Light", "PERSON", "car"]


def named(names: list[str]) -> dict[str, dict]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def pair(family: str, other: str) -> tuple[PreTrainedModel, Teacher]:
    """A student of three of the classes under other names and in another order, and a teacher of 91."""
    student = tiny.build(family, seed=4, **named(NAMES)).requires_grad_(True)
    return student, Teacher(tiny.build(other, seed=5, **named(COCO)), NAMES)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("Traffic_Light", "traffic light"), ("t-shirt", "T Shirt"), ("Straße", "STRASSE"), ("a.b/c", "ABC")],
)
def test_case_and_separators_do_not_count(ours: str, theirs: str):
    assert ClassMap.match([ours], ["other", theirs]).columns == (1,)


def test_an_equal_name_wins_over_one_that_is_only_alike():
    assert ClassMap.match(["Car"], ["car", "Car", "CAR"]).columns == (1,)
    with pytest.raises(ValueError, match=r"'Car' fits several teacher classes, \['car', 'CAR'\]"):
        ClassMap.match(["Car"], ["car", "CAR"])


def test_names_that_stand_for_many_classes_pair_in_their_order():
    assert ClassMap.match(COCO, COCO).is_identity
    assert ClassMap.match(["N/A", "car", "N/A", "N/A"], ["car", "N/A", "N/A"]).columns == (1, 0, 2, None)


def test_the_table_shows_pairs_and_what_has_none():
    found = ClassMap.match(["car", "unicorn"], ["Car", *(f"thing {i}" for i in range(12))])
    assert found.table().splitlines() == [
        "student  teacher",
        "car      Car",
        "unicorn  - (ignored in class losses)",
        "Teacher classes without a partner: " + ", ".join(f"thing {i}" for i in range(10)) + " and 2 more.",
    ]
    assert not found.is_identity
    assert not found.is_complete


def test_a_file_wins_over_the_names(tmp_path: Path):
    for name, text in (
        ("map.yaml", "car: truck\nbus: null\n"),
        ("map.json", json.dumps({"car": "truck", "bus": None})),
    ):
        (tmp_path / name).write_text(text)
        chosen = read_class_map(tmp_path / name)
        assert ClassMap.match(["car", "bus", "bike"], ["bike", "car", "bus", "truck"], chosen).columns == (3, None, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- car\n", "must hold `student class: teacher class` lines"), ("car: 3\n", "must hold `student class")],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_class_map(tmp_path / "map.yaml")
    with pytest.raises(ValueError, match=r"must be a YAML or JSON file, but .*none\.yaml does not exist"):
        read_class_map(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"cat": "car"}, "has an unknown student class 'cat': did you mean 'car'"),
        ({"car": "cra"}, "has an unknown teacher class 'cra': did you mean 'car'"),
        ({"zebra": "car"}, r"unknown student class 'zebra': the classes are \['car', 'bus'\]"),
        ({"bus": "car"}, r"'car' is mapped to several student classes, \['car', 'bus'\]"),
    ],
)
def test_a_map_that_is_wrong_is_refused(chosen: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ClassMap.match(["car", "bus"], ["car", "truck"], chosen)


def test_a_teacher_of_none_of_the_classes_is_refused_with_the_table(build):
    with pytest.raises(ValueError, match=r"knows none of the student's classes(.|\n)*moon +- \(ignored in") as error:
        Teacher(build("detr"), ["moon", "sun"])
    assert "without a partner: circle, square, triangle, star, cross." in str(error.value)


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["rt_detr", "detr"])
def test_answers_are_in_the_student_s_order_and_say_what_is_known(family):
    model = tiny.build(family, seed=5, **named(COCO))
    names = ["unicorn", *NAMES]
    pixels = tiny.batch(64)["pixel_values"]
    plain = Teacher(model, COCO)(pixels).layers[-1]
    found = Teacher(model, names)(pixels).layers[-1]
    assert found.known.tolist() == [False, True, True, True]
    assert found.num_classes == 4
    columns = [4, 1, 3] + ([91] if family == "detr" else [])
    torch.testing.assert_close(found.logits[..., 1:], plain.logits[..., columns])
    assert bool((found.scores()[..., 0] == 0).all())
    if family == "detr":
        expected = plain.logits[..., columns].softmax(-1)[..., :-1]
        torch.testing.assert_close(found.scores()[..., 1:], expected)


def test_a_teacher_of_all_the_classes_hides_nothing():
    _, teacher = pair("rt_detr", "rt_detr")
    assert teacher(tiny.batch(64)["pixel_values"]).layers[-1].known is None


@pytest.mark.parametrize("class_loss", ["softmax_kl", "bce"])
@pytest.mark.parametrize("student_family", ["dab-detr", "rt_detr"])
@pytest.mark.parametrize("known", [3, 2])
def test_class_term_of_91_classes_and_3_is_the_one_computed_by_hand(class_loss, student_family, known):
    """With `known` 2, the teacher has lost its "car"."""
    names = COCO if known == 3 else [n if n != "car" else "vehicle" for n in COCO]
    student = tiny.build(student_family, seed=4, **named(NAMES))
    teacher = Teacher(tiny.build("rt_detr", seed=5, **named(names)), NAMES)
    config = KDDETRConfig(general_points=6, specific_points=False, class_loss=class_loss)
    adapter, batch = adapter_for(student), tiny.batch(64)
    method = KDDETR(config, adapter.spec, teacher.spec)
    own, _ = adapter.encode(batch["pixel_values"])
    wanted = teacher(batch["pixel_values"])
    targets = Targets.from_labels(
        [{"class_labels": x["class_labels"] % 3, "boxes": x["boxes"]} for x in batch["labels"]]
    )
    generator = torch.Generator().manual_seed(3)
    questions = method.query_requests(own, wanted, targets, torch.Generator().manual_seed(3))
    losses = method(own, wanted, targets, BatchTotals.of(targets.counts, 7), generator)
    model = Teacher(teacher.model, names)(batch["pixel_values"])
    answers = model.decode(questions.teacher["general"])[-1].logits.double()
    answers = answers[..., [4, 1, 3][:known]]  # traffic light, person, car
    scores = answers.sigmoid()
    weight = scores.amax(-1) / scores.amax(-1).sum(-1, keepdim=True)
    for layer, asked in enumerate(own.decode(questions.student["general"])):
        logits = asked.logits.double()[..., :known]
        if class_loss == "bce":
            cross = F.binary_cross_entropy_with_logits(logits, scores, reduction="none")
            term = (cross - F.binary_cross_entropy_with_logits(answers, scores, reduction="none")).sum(-1)
        else:
            p, q = (answers / 10).softmax(-1), (logits / 10).softmax(-1)
            term = 100 * (p * (p / q).log()).sum(-1)
        expected = (weight * term).sum() / 2
        torch.testing.assert_close(losses[f"kd_detr_class_general_{layer}"].double(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_classes_without_a_partner_get_no_gradient_and_cost_nothing(activation):
    heads = spec(num_classes=4, activation=activation)
    student, teacher = Fake(heads, trains=True), Fake(heads)
    known = torch.tensor([True, False, True, True])
    mine, wanted = student.output.layers[0], replace(teacher.output.layers[0], known=known)
    masked = among_known(mine, wanted)
    masked.logits.square().sum().backward()
    assert bool((mine.logits.grad[..., 1] == 0).all())
    assert bool((mine.logits.grad[..., [0, 2, 3]] != 0).all())
    with torch.no_grad():
        filled = replace(wanted, logits=wanted.logits.clone())
        filled.logits[..., 1] = -1e4
        cost = HungarianMatcher(1.0, 0.0, 0.0).cost_between(mine, filled)
        moved = replace(mine, logits=mine.logits.clone())
        moved.logits[..., 1] += 7.0
        assert torch.equal(HungarianMatcher(1.0, 0.0, 0.0).cost_between(moved, filled), cost)


@pytest.mark.parametrize("families", list(itertools.product(("rt_detr", "detr"), repeat=2)))
@pytest.mark.parametrize("name", ["kd_detr", "detrdistill", "clockdistill"])
def test_every_method_trains_with_a_teacher_of_other_classes(families, name):
    if name == "kd_detr" and families[0] != families[1]:
        return  # DETR shares no queries with others: the matrix shows the refusal
    student, teacher = pair(*families)
    options = {
        "kd_detr": {"general_points": 5},
        "detrdistill": {"assignment_weight": float(families[0] == families[1])},
        "clockdistill": {"target_queries_weight": float("detr" not in families)},
    }[name]
    kind = METHODS[name]
    method = kind(kind.config_class(**options), adapter_for(student).spec, teacher.spec)
    batch = tiny.batch(64)
    for label in batch["labels"]:
        label["class_labels"] %= 3
    found = Distiller(student, teacher, [method]).train()(batch)
    found["loss"].backward()
    assert found["loss"].isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
