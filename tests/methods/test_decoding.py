"""Several sets of queries in one decoder pass: each answered as if it were asked alone, in every family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_detrkd.adapters import DetectorAdapter, adapter_for
from hf_detrkd.methods.decoding import QueryRequests, decode_requests, decode_together
from hf_detrkd.structures.outputs import ObjectQueries, Predictions
from tests import tiny
from tests.adapters.contract import (
    assert_same,
    both_modes,
    differ,
    foreign,
    gradients,
    inputs_for,
    least_field,
    run,
    some_loss,
)
from tests.methods.fakes import Fake, spec


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[int]]:
    """One entry per call of a module."""
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def groups(*sizes: int) -> torch.Tensor:
    """Group numbers of a batch of two."""
    numbers = [torch.full((size,), i) for i, size in enumerate(sizes)]
    return torch.cat(numbers).expand(2, -1)


def rows(layers: Sequence[Predictions], start: int, stop: int) -> tuple[Predictions, ...]:
    part = slice(start, stop)
    return tuple(
        replace(layer, **{name: getattr(layer, name)[:, part] for name in ("logits", "boxes", "hidden_states")})
        for layer in layers
    )


def joined(queries: ObjectQueries, others: ObjectQueries) -> ObjectQueries:
    names = queries.fields & others.fields
    return ObjectQueries(**{n: torch.cat([getattr(queries, n), getattr(others, n)], 1) for n in names})


def sets_of(adapter: DetectorAdapter) -> list[ObjectQueries]:
    """Three of all fields, the second with groups of its own, and two of a place alone."""
    place = frozenset({least_field(adapter.spec)})
    return [
        foreign(adapter.spec, 5),
        foreign(adapter.spec, 3, place, seed=2),
        replace(foreign(adapter.spec, 6, seed=3), groups=groups(4, 2)),
        foreign(adapter.spec, 1, seed=4),
        foreign(adapter.spec, 4, place, seed=5),
    ]


@both_modes
def test_every_set_is_answered_as_if_it_were_asked_alone(build, askable, training):
    adapter = adapter_for(build(askable).train(training).requires_grad_(True))
    output, sets = run(adapter, inputs_for(adapter, padded=True), with_labels=training), sets_of(adapter)
    alone = [output.decode(queries) for queries in sets]
    together = decode_together(output.decode, sets)
    for queries, answers, expected in zip(sets, together, alone, strict=True):
        assert answers[0].logits.shape[1] == queries.size
        assert_same(answers, expected)
    losses = [torch.stack([some_loss(layers) for layers in answers]).sum() for answers in (alone, together)]
    first, second = (gradients(adapter.model, loss) for loss in losses)
    norm = max(gradient.abs().max() for gradient in first.values() if gradient is not None)
    for name, gradient in first.items():
        assert (gradient is None) == (second[name] is None), name
        if gradient is not None:
            assert (second[name] - gradient).abs().max() < 1e-3 * norm, name  # float32 through a whole backbone


def test_sets_that_see_each_other_would_be_answered_otherwise(build, askable):
    adapter = adapter_for(build(askable))
    output, (one, *_, other) = run(adapter, inputs_for(adapter)), (foreign(adapter.spec, 5), foreign(adapter.spec, 6))
    mixed = rows(output.decode(joined(one, other)), 0, 5)
    assert differ(mixed[-1:], decode_together(output.decode, [one, other])[0][-1:])


@both_modes
def test_groups_within_a_set_are_kept(build, askable, training):
    adapter = adapter_for(build(askable).train(training))
    output = run(adapter, inputs_for(adapter))
    one, other = foreign(adapter.spec, 5), foreign(adapter.spec, 3, seed=2)
    both = replace(joined(one, other), groups=groups(5, 3))
    alone = output.decode(one), output.decode(other)
    for answers in (
        decode_together(output.decode, [both])[0],
        decode_together(output.decode, [both, foreign(adapter.spec, 4, seed=3)])[0],
        decode_together(output.decode, [foreign(adapter.spec, 4, seed=3), both])[1],
    ):
        assert_same(rows(answers, 0, 5), alone[0])
        assert_same(rows(answers, 5, 8), alone[1])


def test_groups_differ_from_image_to_image(build, askable):
    adapter = adapter_for(build(askable))
    output, queries = run(adapter, inputs_for(adapter)), foreign(adapter.spec, 6)
    numbers = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1]])
    answers = output.decode(replace(queries, groups=numbers))
    for image, size in enumerate((4, 1)):
        for start, stop in ((0, size), (size, 6)):
            part = ObjectQueries(**{name: getattr(queries, name)[:, start:stop] for name in queries.fields})
            for layer, alone in zip(answers, output.decode(part), strict=True):
                torch.testing.assert_close(layer.logits[image, start:stop], alone.logits[image], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(layer.boxes[image, start:stop], alone.boxes[image], atol=1e-5, rtol=1e-5)


def test_sets_of_the_same_fields_share_one_decoder_pass(build, askable):
    adapter = adapter_for(build(askable))
    output, sets = run(adapter, inputs_for(adapter)), sets_of(adapter)
    for asked, passes in ((sets[:1], 1), ([sets[0], sets[2], sets[3]], 1), (sets, 2), ([], 0)):
        if adapter.spec.query_fields == {least_field(adapter.spec)}:
            passes = min(passes, 1)
        with calls_of(adapter.decoder) as calls:
            assert len(decode_together(output.decode, asked)) == len(asked)
        assert len(calls) == passes


def test_a_set_alone_is_handed_on_as_it_is():
    detector, queries = Fake(spec()), ObjectQueries(boxes=torch.rand(2, 4, 4))
    decode_together(detector.decode, [queries])
    assert detector.asked[0] is queries


def test_every_method_gets_its_own_answers_by_its_own_names():
    student, teacher = Fake(spec()), Fake(spec())

    def queries(size: int) -> ObjectQueries:
        return ObjectQueries(boxes=torch.rand(2, size, 4))

    first = QueryRequests({"one": queries(1), "two": queries(2)}, {"one": queries(3)})
    second = QueryRequests({"one": queries(4)}, {})
    decoded = decode_requests([first, second, QueryRequests()], student.output, teacher.output)
    assert len(student.asked) == len(teacher.asked) == 1
    sizes = [
        {side: {n: a[0].logits.shape[1] for n, a in getattr(r, side).items()} for side in ("student", "teacher")}
        for r in decoded
    ]
    assert sizes == [
        {"student": {"one": 1, "two": 2}, "teacher": {"one": 3}},
        {"student": {"one": 4}, "teacher": {}},
        {"student": {}, "teacher": {}},
    ]
    whole, start = student.answered[0], 0
    for answers in (*decoded[0].student.values(), *decoded[1].student.values()):
        size = answers[0].logits.shape[1]
        for layer, everything in zip(answers, whole, strict=True):
            for name in ("logits", "boxes", "hidden_states"):
                assert torch.equal(getattr(layer, name), getattr(everything, name)[:, start : start + size])
            assert layer.activation == everything.activation
        start += size


def test_nobody_needs_a_teacher_who_asks_none():
    student, questions = Fake(spec()), QueryRequests({"one": ObjectQueries(boxes=torch.rand(2, 3, 4))})
    (decoded,) = decode_requests([questions], student.output, None)
    assert decoded.student.keys() == {"one"} and not decoded.teacher


def test_what_a_teacher_does_not_know_stays_with_every_set():
    student, known = Fake(spec()), torch.tensor([True, False, True])
    queries = [ObjectQueries(boxes=torch.rand(2, size, 4)) for size in (1, 2)]
    answers = decode_together(lambda q: tuple(replace(a, known=known) for a in student.decode(q)), queries)
    assert all(layer.known is known for layers in answers for layer in layers)


# --- groups in the decoders ------------------------------------------------------------------------------------------


@both_modes
def test_a_pass_with_groups_leaves_the_model_as_it_was(build, askable, training):
    adapter = adapter_for(build(askable).train(training))
    output, queries = run(adapter, inputs_for(adapter)), foreign(adapter.spec, 6)

    def state() -> tuple:
        modules = [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in adapter.model.modules()]
        config = adapter.model.config
        return modules, [config._attn_implementation, config.backbone_config._attn_implementation]

    before, alone = state(), output.decode(queries)
    output.decode(replace(queries, groups=groups(4, 2)))
    assert state() == before
    assert_same(output.decode(queries), alone)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        output.decode(replace(queries, groups=groups(4, 2)[:, :3]))  # too few numbers
    assert state() == before


@pytest.mark.parametrize("name", tiny.GROUPED)
def test_a_backbone_s_own_attention_implementation_survives_a_pass_with_groups(build, name):
    adapter = adapter_for(build(name))
    output, config = run(adapter, inputs_for(adapter)), adapter.model.config
    config.backbone_config._attn_implementation = "eager"
    output.decode(replace(foreign(adapter.spec, 6), groups=groups(4, 2)))
    assert (config._attn_implementation, config.backbone_config._attn_implementation) == ("sdpa", "eager")


def test_groups_mean_the_same_to_eager_attention(build, askable):
    answers = []
    for implementation in ("sdpa", "eager"):
        adapter = adapter_for(build(askable))
        adapter.model.config._attn_implementation = implementation
        output = run(adapter, inputs_for(adapter))
        answers.append(output.decode(replace(foreign(adapter.spec, 6), groups=groups(4, 2))))
    assert_same(*answers)


def test_bf16_autocast_keeps_groups_apart(build, askable):
    adapter = adapter_for(build(askable).train().requires_grad_(True))
    sets = [foreign(adapter.spec, 5), foreign(adapter.spec, 3, seed=2)]
    with torch.autocast("cpu", torch.bfloat16):
        output = run(adapter, inputs_for(adapter, padded=True))
        (first, _), (other, _) = (decode_together(output.decode, [sets[0], others]) for others in (sets[1], sets[0]))
    for layer, same in zip(first, other, strict=True):
        torch.testing.assert_close(layer.logits, same.logits, atol=0.05, rtol=0.05)
        assert layer.logits.isfinite().all() and layer.boxes.isfinite().all()
    found = gradients(adapter.model, some_loss(first))
    assert all(gradient is None or gradient.isfinite().all() for gradient in found.values())
