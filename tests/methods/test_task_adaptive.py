"""Task-adaptive regularization as a whole: gradients, nothing to learn, what it asks, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_detrkd.adapters import spec_for
from hf_detrkd.distillation.teacher import Teacher
from hf_detrkd.methods import TaskAdaptiveConfig, TaskAdaptiveRegularization
from hf_detrkd.structures.outputs import ObjectQueries, Proposals
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import tiny
from tests.methods.backward import total
from tests.methods.fakes import seeded, spec, targets_of
from tests.methods.task_adaptive import (
    DISTANCES,
    GATES,
    PASSES,
    a_map,
    answers_to,
    method_of,
    output,
    proposals_of,
    proposing,
)


def whole(counts: tuple[int, ...] = (2, 1), widths: Sequence[int] = (4, 3), **options: Any) -> Any:
    """Method, student, teacher and targets."""
    targets = targets_of(*counts)
    proposals = proposals_of(targets, [3] * len(counts))
    student, teacher = answers_to(proposals, "softmax", trains=True), answers_to(proposals, "softmax")
    own = [a_map(w, (4, 4), len(counts), trains=True) for w in widths]
    theirs = [a_map(4, (4, 4), len(counts))]
    method = method_of(proposing(widths=widths), **options)
    return method, output(own, answers=student, proposals=proposals), output(theirs, answers=teacher), targets


def run(method: TaskAdaptiveRegularization, student: Any, teacher: Any, targets: Targets) -> dict[str, Tensor]:
    return method(student, teacher, targets, BatchTotals.of(targets.counts, 1), torch.Generator())


@pytest.mark.parametrize("gate", GATES)
def test_a_student_that_is_its_teacher_has_no_loss(gate):
    method, student, _, targets = whole(widths=(4,), class_gate=gate)
    losses = run(method, student, student, targets)
    assert losses.keys() == {"task_adaptive_features_0", *DISTANCES, *PASSES} and losses["task_adaptive_box_pass"] > 0
    classes = losses.pop("task_adaptive_class_0")
    assert total(losses, PASSES) == 0 and (classes == 0 if gate == "better" else abs(classes) < 1e-6)


def test_gradients_reach_features_logits_boxes_and_projections():
    method, student, teacher, targets = whole()
    leaves = [m.values for m in student.features["neck"]]
    leaves += [student.layers[0].logits, student.layers[0].class_boxes, *method.parameters()]
    losses = run(method, student, teacher, targets)
    assert all(losses[name].requires_grad for name in losses if name not in PASSES)
    for gradient in torch.autograd.grad(total(losses, PASSES), leaves):
        assert gradient.any() and gradient.isfinite().all()


def test_a_call_leaves_nothing_behind_and_draws_no_random_numbers():
    method, *first = whole()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    assert before.keys() == {"projections.1.weight", "projections.1.bias"}
    attributes, losses = set(vars(method)), run(method, *first)
    run(method, *whole((1, 4, 0))[1:])
    torch.manual_seed(77)
    again = run(method, *first)
    assert losses.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in losses.items())
    assert set(vars(method)) == attributes and torch.equal(torch.rand(1), torch.rand(1, generator=seeded(77)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())


def test_losses_are_computed_in_float32_under_autocast():
    method, *sides = whole()
    expected = run(method, *sides)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(method, *sides)
    assert all(
        found[name].dtype == torch.float32 and torch.equal(found[name], value) for name, value in expected.items()
    )


@pytest.mark.parametrize("case", ["no objects", "no foreground", "no valid proposal", "no proposals", "one pixel"])
@pytest.mark.parametrize("gate", GATES)
def test_nothing_to_learn_gives_zero_with_a_graph_and_no_nan(case, gate):
    method, student, teacher, targets = whole((0, 0) if case == "no objects" else (2, 1), class_gate=gate)
    proposals, answers, wanted = student.proposals, student.layers[0], teacher.layers[0]
    if case == "no foreground":
        proposals = replace(proposals, labels=torch.full_like(proposals.labels, -1))
    elif case == "no valid proposal":
        proposals = replace(proposals, valid=torch.zeros_like(proposals.valid))
    elif case == "no proposals":
        proposals = Proposals(*(values[:, :0] for values in vars(proposals).values()))
        answers, wanted = answers.rows(0, 0), wanted.rows(0, 0)
    elif case == "one pixel":
        for boxes in (proposals.boxes, proposals.matched, targets.boxes, wanted.class_boxes, answers.class_boxes.data):
            boxes[..., 2:] = 1 / 1024
        answers.class_boxes.data[:, ::2, :, 2:] = 0.0  # clipped away
    student, teacher = replace(student, layers=(answers,), proposals=proposals), replace(teacher, layers=(wanted,))
    teacher = replace(teacher, decode=lambda _: (wanted,))
    losses = run(method, student, teacher, targets)
    assert all(value.isfinite() for value in losses.values())
    if case != "one pixel":
        assert all(losses[name] == 0 for name in (*DISTANCES, *PASSES))
        assert (losses["task_adaptive_features_0"] == 0) == (case == "no objects")
    leaves = [student.features["neck"][0].values, answers.logits, answers.class_boxes]
    gradients = torch.autograd.grad(total(losses, PASSES), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_teacher_is_asked_at_the_students_proposals():
    method, student, teacher, targets = whole()
    for content, fields in (("zero", {"content", "boxes"}), ("own", {"boxes"})):
        method = method_of(proposing(widths=(4, 3)), content=content)
        asked = method.query_requests(student, teacher, targets, torch.Generator())
        assert not asked.student and asked.teacher.keys() == {"proposals"}
        queries = asked.teacher["proposals"]
        assert queries.fields - {"groups"} == fields and torch.equal(queries.boxes, student.proposals.boxes)
        assert content == "own" or (queries.content.shape[-1] == 8 and not queries.content.any())


@pytest.mark.parametrize("content", ["zero", "own"])
def test_padding_is_no_query_that_a_real_proposal_sees(content):
    """A decoder's queries see each other: an image's answers must not follow the number of proposals of another."""
    teacher = Teacher(tiny.build("dino_detr"), tiny.LABELS)
    _, student, _, targets = whole((3, 0))
    method = method_of(proposing(widths=(4, 3)), teacher.spec, content=content)
    encoded = teacher(tiny.batch(64)["pixel_values"])
    queries = method.query_requests(student, encoded, targets, torch.Generator()).teacher["proposals"]
    answers = encoded.decode(queries)[-1]
    count = int(student.proposals.valid[1].sum())
    alone = encoded.decode(ObjectQueries(**{k: vars(queries)[k][:, :count] for k in queries.fields}))[-1]
    assert 0 < count < queries.size
    torch.testing.assert_close(answers.logits[1, :count], alone.logits[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(answers.boxes[1, :count], alone.boxes[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["yolos", "detr"])
def test_a_teacher_that_cannot_be_asked_at_boxes_is_refused_for_proposals(family):
    teacher = spec_for(tiny.config(family))
    message = (
        f"The proposals of a fake student are boxes, which a {family} teacher cannot decode: choose another "
        "teacher, or set proposals to false to distil only the features."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        method_of(proposing(), teacher)
    assert method_of(proposing(), teacher, proposals=False).weights == {"task_adaptive_features": 1.0}
    assert method_of(spec(neck=(4,)), teacher).weights == {"task_adaptive_features": 1.0}


def test_a_student_of_one_to_one_queries_gets_the_features_alone():
    _, student, teacher, targets = whole(widths=(4,))
    off = method_of(proposing(), proposals=False)
    for method in (method_of(spec(neck=(4,))), off):
        assert method.weights == {"task_adaptive_features": 1.0}
        asked = method.query_requests(student, teacher, targets, torch.Generator())
        assert not asked.student and not asked.teacher
        assert run(method, student, teacher, targets).keys() == {"task_adaptive_features_0"}
    parts = ("features", "class", "box")
    assert method_of().weights == {f"task_adaptive_{part}": 1.0 for part in parts}
    without = replace(student, proposals=None)
    assert run(method_of(), without, teacher, targets).keys() == {"task_adaptive_features_0"}


@pytest.mark.parametrize(("option", "value"), [("feature_level", "memory"), ("class_gate", "always")])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option} must be .* got '{value}'"):
        TaskAdaptiveConfig(**{option: value})
