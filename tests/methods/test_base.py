"""Code shared by all methods: layer pairs, and queries that two decoders can share."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from hf_detrkd.adapters import spec_for
from hf_detrkd.methods import METHODS
from hf_detrkd.methods.layer_mapping import layer_pairs, per_layer
from hf_detrkd.methods.queries import shared_fields, takes_place, teacher_queries
from hf_detrkd.structures.loss_key import LossKey
from hf_detrkd.structures.outputs import ObjectQueries
from tests import each, tiny
from tests.methods.fakes import Fake, spec
from tests.methods.naive import taught_by


SPECS = {(name, width): spec_for(tiny.config(name, width)) for name in tiny.FAMILIES for width in (32, 64)}
PLACELESS = ("detr", "table-transformer", "yolos")
OF_POINTS = ("conditional_detr", "deformable_detr/plain", "deformable_detr/refine")
OF_BOXES = tuple(name for name in tiny.FAMILIES if name not in PLACELESS + OF_POINTS)


@each("num_student", range(1, 8))
@each("num_teacher", range(1, 8))
def test_teacher_layer_t_teaches_student_layer_ceil_of_t_times_the_ratio_of_depths(num_student, num_teacher):
    pairs = layer_pairs(num_student, num_teacher)
    assert [t for _, t, _ in pairs] == list(range(num_teacher))
    for s, t, weight in pairs:
        assert s + 1 == math.ceil(Fraction((t + 1) * num_student, num_teacher))
        assert weight == pytest.approx(1 / len(taught_by(num_student, num_teacher)[s + 1]))
    assert pairs[-1][0] == num_student - 1


@pytest.mark.parametrize(
    ("num_student", "num_teacher", "students"),
    [(3, 6, [0, 0, 1, 1, 2, 2]), (6, 3, [1, 3, 5]), (3, 2, [1, 2]), (2, 3, [0, 1, 1]), (6, 6, [0, 1, 2, 3, 4, 5])],
)
def test_layers_meet_as_in_the_paper_s_figure(num_student, num_teacher, students):
    assert [s for s, _, _ in layer_pairs(num_student, num_teacher)] == students


def test_values_that_meet_in_a_layer_are_averaged():
    losses = per_layer(LossKey("method", "part"), torch.tensor([1.0, 3.0, 5.0, 8.0]), layer_pairs(2, 4))
    assert losses == {"method_part_0": 2.0, "method_part_1": 6.5}


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_equal_models_share_every_field(name):
    assert shared_fields(SPECS[name, 32], SPECS[name, 32]) == SPECS[name, 32].query_fields


def test_plain_deformable_models_of_equal_width_share_embeddings_and_points():
    assert shared_fields(SPECS["deformable_detr/plain", 32], SPECS["deformable_detr/plain", 32]) == {
        "content",
        "position",
        "points",
    }


@each("student", tiny.FAMILIES)
@each("teacher", tiny.FAMILIES)
def test_unequal_models_share_a_place_or_nothing(student, teacher):
    if teacher in OF_BOXES and student not in PLACELESS:
        expected = {"boxes"}
    elif teacher in OF_POINTS and student in OF_POINTS:
        expected = {"points"}
    else:
        expected = set()
    assert shared_fields(SPECS[student, 32], SPECS[teacher, 64]) == expected


def test_a_box_serves_where_a_point_is_wanted_and_not_the_other_way():
    answers = {
        fields: [takes_place(spec(fields=fields), p) for p in ("boxes", "points")]
        for fields in ("boxes", "points", "position")
    }
    assert answers == {"boxes": [True, False], "points": [True, True], "position": [False, False]}


def test_teacher_queries_are_detached_and_only_what_both_understand():
    student, teacher = Fake(spec()), Fake(spec(), trains=True)
    teacher.output.queries.boxes.requires_grad_()
    queries = teacher_queries(student.output, teacher.output, frozenset({"boxes"}))
    assert queries.fields == {"boxes"} and torch.equal(queries.boxes, teacher.output.queries.boxes)
    assert not queries.boxes.requires_grad


@pytest.mark.parametrize(("maps", "kept"), [([(4, 5)], True), ([(5, 4)], False), ([(8, 10), (4, 5)], False)])
def test_encoder_rows_are_handed_on_only_where_both_have_the_same_grid(maps, kept):
    student = Fake(spec(neck=[8] * len(maps)), maps=maps)
    teacher = Fake(spec())
    object.__setattr__(
        teacher.output, "queries", ObjectQueries(boxes=torch.rand(2, 6, 4), rows=torch.ones(2, 6).long())
    )
    assert ("rows" in teacher_queries(student.output, teacher.output, frozenset({"boxes"})).fields) == kept


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_its_parts_and_its_paper(name):
    method_class = METHODS[name]
    method = method_class(method_class.config_class(), spec(), spec())
    assert method_class.name == name
    assert method_class.paper is None or method_class.paper.arxiv in method_class.__doc__
    assert (method_class.paper is None) == (not method_class.needs_teacher)
    assert all(key.startswith(f"{name}_") and weight > 0 for key, weight in method.weights.items())
