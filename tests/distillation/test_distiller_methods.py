"""Inputs of the methods in the distiller: step, seed, the teacher's view; and invalid methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_detrkd.adapters import adapter_for
from hf_detrkd.distillation.distiller import Distiller
from hf_detrkd.distillation.teacher import Teacher
from hf_detrkd.methods import (
    KDDETR,
    METHODS,
    CLoCKDistill,
    CLoCKDistillConfig,
    DETRDistill,
    DETRDistillConfig,
    DistillationMethod,
    ExtraQueries,
    ExtraQueriesConfig,
    KDDETRConfig,
)
from hf_detrkd.methods.queries import shared_place
from hf_detrkd.structures.loss_key import LossKey
from tests import tiny
from tests.distillation.distillers import Stub, distiller_of
from tests.methods.fakes import spec


def test_step_and_seed_alone_drive_the_method_s_random_numbers(build):
    draws = {}
    for seed in range(4):
        distiller, method = distiller_of(build, seed=seed)
        for step in range(4):
            distiller(tiny.batch(32, boxes=(1,)), step=step)
            draws[seed, step] = tuple(method.calls[-1]["draw"].tolist())
    assert len(set(draws.values())) == 16
    torch.manual_seed(99)  # another process: its own random state and images
    distiller, method = distiller_of(build, seed=2)
    distiller(tiny.batch(64, boxes=(0, 3, 1), seed=5), step=3)
    assert tuple(method.calls[-1]["draw"].tolist()) == draws[2, 3]


def test_general_points_change_every_step_and_follow_the_seed(build):
    teacher = Teacher(tiny.build("detr", seed=1), tiny.LABELS)

    def parts(seed: int, step: int) -> dict[str, Tensor]:
        student = build("detr").requires_grad_(True)
        method = KDDETR(KDDETRConfig(general_points=10), adapter_for(student).spec, teacher.spec)
        return Distiller(student, teacher, [method], seed=seed).train()(tiny.batch(64), step=step)["parts"]

    base, again, later, other = parts(0, 0), parts(0, 0), parts(0, 1), parts(1, 0)
    for part in ("class", "box", "giou"):
        general, specific = f"kd_detr_{part}_general", f"kd_detr_{part}_specific"
        assert torch.equal(base[general], again[general])
        assert len({float(found[general]) for found in (base, later, other)}) == 3
        assert all(torch.equal(base[specific], found[specific]) for found in (again, later, other))


def test_several_methods_give_what_each_gives_alone_with_one_pass_of_the_teacher(build, askable):
    """And with one decoder pass for all queries that can share one: at most two kinds of queries are asked here."""
    student, teacher = build(askable).requires_grad_(True), Teacher(tiny.build(askable, seed=1), tiny.LABELS)
    pair = adapter_for(student).spec, teacher.spec
    placed = shared_place(*pair) is not None
    methods = [
        KDDETR(KDDETRConfig(general_points=6), *pair),
        DETRDistill(DETRDistillConfig(), *pair) if "points" not in pair[0].query_fields else None,
        CLoCKDistill(CLoCKDistillConfig(target_queries_weight=float(placed)), *pair),
        ExtraQueries(ExtraQueriesConfig(extra_queries=4), pair[0]),
    ]
    methods = [method for method in methods if method is not None]
    student.eval()  # no denoising, no dropout: equal answers
    calls: list[str] = []
    hooks = [
        teacher.adapter.body.register_forward_pre_hook(lambda *_: calls.append("teacher")),
        adapter_for(student).decoder.register_forward_pre_hook(lambda *_: calls.append("decoder")),
    ]

    def losses(chosen: list[DistillationMethod]) -> dict[str, Tensor]:
        distiller = Distiller(student, teacher if any(m.needs_teacher for m in chosen) else None, chosen)
        distiller.training = True
        return distiller.losses(tiny.batch(64), step=3).distillation

    together = losses(methods)
    assert calls.count("teacher") == 1
    assert calls.count("decoder") <= 4  # the student's own pass, and the kinds of queries
    for hook in hooks:
        hook.remove()
    alone = {name: value for method in methods for name, value in losses([method]).items()}
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=2e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_teacher_is_shown_its_own_view_where_there_is_one(build):
    distiller, method = distiller_of(build, "rt_detr")
    seen: list[Tensor] = []
    distiller.teacher.adapter.body.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    batch, view = tiny.batch(64), tiny.batch(96)["pixel_values"]
    distiller(batch | {"teacher_pixel_values": view})
    distiller(batch)
    assert [tensor.shape[-1] for tensor in seen] == [96, 64]
    assert method.calls[0]["teacher"].features["encoder"][0].values.shape[-1] == 12


@pytest.mark.parametrize("name", ["kd_detr", "detrdistill", "clockdistill"])
def test_every_method_trains_with_a_teacher_of_another_image_size(build, name):
    student, teacher = build("rt_detr").requires_grad_(True), Teacher(tiny.build("rt_detr", 64, seed=1), tiny.LABELS)
    kind = METHODS[name]
    method = kind(kind.config_class(), adapter_for(student).spec, teacher.spec)
    view = tiny.batch((96, 128))["pixel_values"]
    found = Distiller(student, teacher, [method]).train()(tiny.batch(64) | {"teacher_pixel_values": view})
    found["loss"].backward()
    assert found["loss"].isfinite()


class Yielding(Stub):
    """Written as a generator, as methods once were."""

    def losses(self, *args: Any) -> Any:
        yield []
        return super().losses(*args)


class Streaming(Stub):
    """Its costs would be exhausted before they are copied."""

    def costs(self, *args: Any) -> Any:
        yield torch.zeros(2, 3)


class Nameless(Stub):
    def losses(self, *args: Any) -> Any:
        return {"stub_one_0": self.scale}


class Unsummed(Stub):
    def losses(self, *args: Any) -> Any:
        return {LossKey("stub", "one", layer=0): torch.ones(3)}


class Forgetful(Stub):
    def losses(self, *args: Any) -> Any:
        super().losses(*args)


class Lossless(DistillationMethod):
    name, weights = "lossless", {"lossless_one": 1.0}


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Yielding, TypeError, "Yielding.losses must return a dict .*, got a generator: write it with `return`"),
        (Streaming, TypeError, "Streaming.costs must return a list of tensors, got a generator"),
        (Forgetful, TypeError, "Forgetful.losses must return a dict of scalar tensors by LossKey, got a NoneType"),
        (Nameless, TypeError, r"by LossKey, got 'stub_one_0' \(str\): a Parameter of shape \(\)"),
        (Unsummed, TypeError, r"by LossKey, got 'stub_one_0' \(LossKey\): a Tensor of shape \(3,\)"),
        (lambda: Lossless(None, spec(), spec()), NotImplementedError, "^$"),
    ],
)
def test_a_method_that_returns_anything_but_losses_is_refused(build, kind, error, message):
    """Such a loss would be missing from the sum without a word."""
    distiller = Distiller(build("detr"), Teacher(tiny.build("detr", seed=1), tiny.LABELS), [kind()]).train()
    with pytest.raises(error, match=message):
        distiller(tiny.batch(64))


class Assigned(Stub):
    """Asks for two assignments and gets them in their order."""

    def costs(self, student: Any, teacher: Any, decoded: Any, targets: Any) -> list[torch.Tensor]:
        return [torch.full((1, 2), 3.0), torch.full((4,), 5.0)]

    def losses(self, *args: Any) -> Any:
        self.assignments = args[-1]
        return super().losses(*args)


def test_a_method_without_costs_gets_none_and_one_with_costs_its_own(build):
    distiller, plain = distiller_of(build)
    other = Assigned()
    other.name = "other"
    seen: list[Any] = []
    given = plain.losses
    plain.losses = lambda *args: seen.append(args[-1]) or given(*args)
    distiller.methods["other"] = other
    distiller(tiny.batch(64))
    assert seen == [[]]
    assert [array.tolist() for array in other.assignments] == [[[3.0, 3.0]], [5.0] * 4]
