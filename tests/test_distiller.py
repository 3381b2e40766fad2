"""The module that is trained: how losses are weighed and named, what drives the points, what eval mode leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_detrkd.adapters import adapter_for
from hf_detrkd.distiller import Distiller
from hf_detrkd.matching import Assigning
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
from hf_detrkd.outputs import DetectorOutput
from hf_detrkd.questions import Questions, Replies
from hf_detrkd.targets import BatchTotals, Targets
from hf_detrkd.teacher import Teacher
from tests import tiny
from tests.methods.fakes import spec


class Stub(DistillationMethod):
    """Losses that are easy to foretell, and a record of what each call was given."""

    name, groups = "stub", ("left", "right")
    weights = {"stub_one": 2.0, "stub_two": 0.5}

    def __init__(self) -> None:
        super().__init__(None, spec(), spec())
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.calls: list[dict[str, Any]] = []

    def questions(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, generator: torch.Generator
    ) -> Questions:
        self.calls.append({"draw": torch.randn(4, generator=generator)})
        return Questions()

    def steps(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        replies: Replies,
        targets: Targets,
        totals: BatchTotals,
    ) -> Assigning[dict[str, Tensor]]:
        yield []
        self.calls[-1] |= {"student": student, "teacher": teacher, "targets": targets, "totals": totals}
        mean = student.layers[-1].boxes.mean()
        return {
            "stub_one_0": self.scale,
            "stub_one_1": 2 * mean,
            "stub_two_left_0": self.scale * 10,
            "stub_two_right_0": mean * 0 + 100,
        }


def distiller_of(build: Any, family: str = "detr", **options: Any) -> tuple[Distiller, Stub]:
    method = Stub()
    teacher = Teacher(tiny.build(family, seed=1), tiny.LABELS)
    return Distiller(build(family).requires_grad_(True), teacher, [method], **options).train(), method


# --- the sum ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_loss_is_the_task_loss_plus_the_weighted_sum(build, family, weight):
    distiller, method = distiller_of(build, family)
    inputs = tiny.batch(64)
    torch.manual_seed(0)  # denoising draws random numbers
    found = distiller(**inputs, distillation_weight=weight)
    targets = Targets.from_labels(inputs["labels"])
    torch.manual_seed(0)
    student, task = distiller.adapter(inputs["pixel_values"], None, targets)
    mean = student.layers[-1].boxes.mean()
    weighted = 2.0 * (3 + 2 * mean) + 0.5 * (30 + 100)
    torch.testing.assert_close(found["loss"], student.loss + weight * weighted)
    torch.testing.assert_close(found["loss"] - weight * weighted, sum(task.values()), atol=1e-4, rtol=1e-4)
    found["loss"].backward()
    torch.testing.assert_close(method.scale.grad, torch.tensor(weight * (2.0 + 0.5 * 10)))


def test_without_weight_neither_teacher_nor_method_is_asked(build):
    distiller, method = distiller_of(build)
    asked: list[int] = []
    distiller.teacher.model.register_forward_hook(lambda *_: asked.append(1))
    distiller.teacher.model.model.register_forward_hook(lambda *_: asked.append(1))
    found = distiller(**tiny.batch(64), distillation_weight=0.0)
    assert not asked and not method.calls
    assert all(name.startswith("task_") for name in found["parts"])


def test_parts_are_detached_and_named_with_layers_summed(build):
    distiller, _ = distiller_of(build)
    found = distiller(**tiny.batch(64))
    parts = found["parts"]
    task = {name for name in parts if name.startswith("task_")} - {"task_loss"}
    expected = {"task_loss", "distillation_loss", "stub_one", "stub_two_left", "stub_two_right"}
    assert parts.keys() - task == expected and task
    assert all(value.ndim == 0 and not value.requires_grad for value in parts.values())
    mean = found["pred_boxes"].mean()
    torch.testing.assert_close(parts["stub_one"], 3 + 2 * mean.detach())
    torch.testing.assert_close(parts["task_loss"], sum(parts[name] for name in task))
    torch.testing.assert_close(found["loss"].detach(), parts["task_loss"] + parts["distillation_loss"])
    assert found["loss"].requires_grad


def test_the_method_gets_both_passes_the_truth_and_its_divisors(build):
    distiller, method = distiller_of(build)
    inputs = tiny.batch(64, boxes=(9, 0, 2))
    distiller(**inputs)
    (call,) = method.calls
    assert call["totals"] == BatchTotals(3.0, 11.0, 9.0)  # 7 queries hold 7 of the 9 boxes
    assert call["targets"].counts == (9, 0, 2)
    wanted = distiller.teacher(inputs["pixel_values"]).layers[-1]
    torch.testing.assert_close(call["teacher"].layers[-1].logits, wanted.logits)
    assert call["student"].layers[-1].logits.requires_grad and not call["teacher"].layers[-1].logits.requires_grad


def test_totals_of_the_whole_batch_replace_those_of_this_process(build):
    distiller, method = distiller_of(build)
    inputs = tiny.batch(64)
    alone = distiller(**inputs)["parts"]
    shared = distiller(**inputs, totals=torch.tensor([4.0, 6.0, 6.0, 0.5]))["parts"]  # this process: 2, 3, 3
    totals = method.calls[1]["totals"]
    assert [float(v) for v in (totals.images, totals.boxes, totals.matched, totals.share)] == [4.0, 6.0, 6.0, 0.5]
    torch.testing.assert_close(shared["task_loss"], alone["task_loss"] / 2)


# --- weights ---------------------------------------------------------------------------------------------------------

NAMES = [f"stub_{part}_{layer}" for part in ("one", "two_left", "two_right") for layer in (0, 1)]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, [2, 2, 0.5, 0.5, 0.5, 0.5]),
        ({"stub": 7}, [7] * 6),
        ({"stub_two": 7}, [2, 2, 7, 7, 7, 7]),
        ({"stub_two_left": 7}, [2, 2, 7, 7, 0.5, 0.5]),
        ({"stub_two_left_1": 7}, [2, 2, 0.5, 7, 0.5, 0.5]),
        ({"stub_one_0": 0}, [0, 2, 0.5, 0.5, 0.5, 0.5]),
        ({"stub": 1, "stub_two": 7, "stub_two_left": 8, "stub_two_left_1": 9}, [1, 1, 8, 9, 7, 7]),
        ({"stub_two_left_1": 9, "stub_two_left": 8, "stub_two": 7, "stub": 1}, [1, 1, 8, 9, 7, 7]),
        ({"stub_two_left": 8, "stub": 1}, [1, 1, 8, 8, 1, 1]),
        ({"stub_t": 7}, [2, 2, 7, 7, 7, 7]),
    ],
)
def test_the_longest_key_that_begins_a_name_weighs_it(build, chosen, expected):
    distiller, _ = distiller_of(build, loss_weights=chosen)
    assert [distiller.weight_of(name) for name in NAMES] == expected


def test_chosen_weights_reach_the_loss(build):
    distiller, _ = distiller_of(build, loss_weights={"stub": 0.0, "stub_two_right": 3.0})
    parts = distiller(**tiny.batch(64))["parts"]
    torch.testing.assert_close(parts["distillation_loss"], torch.tensor(300.0))


@pytest.mark.parametrize("key", ["stub_three", "left", "two", "stub_one_left_x", "stub_one_0_0", "task_loss"])
def test_a_key_that_begins_no_loss_is_refused_with_the_names_of_the_parts(build, key):
    known = "stub_one, stub_two, stub_one_left, stub_one_right, stub_two_left, stub_two_right"
    with pytest.raises(
        ValueError, match=f"loss_weights names '{key}', which begins no loss of this run: they are {known}"
    ):
        distiller_of(build, loss_weights={key: 1.0})


@pytest.mark.parametrize("config", [KDDETRConfig(), DETRDistillConfig(), DETRDistillConfig(variant="released")])
def test_every_loss_of_every_method_has_its_part_s_weight(build, config):
    student = build("rt_detr").requires_grad_(True)
    teacher = Teacher(tiny.build("rt_detr", seed=1), tiny.LABELS)
    method_class = KDDETR if isinstance(config, KDDETRConfig) else DETRDistill
    method = method_class(config, adapter_for(student).spec, teacher.spec)
    distiller = Distiller(student, teacher, [method], {f"{method.name}_": 0.5}).train()
    parts = distiller(**tiny.batch(64))["parts"]
    own = [value for name, value in parts.items() if name.startswith(method.name)]
    assert len(own) >= 6
    torch.testing.assert_close(parts["distillation_loss"], 0.5 * sum(own))


def test_weights_without_a_method_are_refused(build):
    message = "loss_weights names 'stub', which begins no loss of this run: they are none, since there is no method"
    with pytest.raises(ValueError, match=message):
        Distiller(build("detr"), loss_weights={"stub": 1.0})


def test_a_method_without_a_teacher_and_the_reverse_are_refused(build):
    message = "A method needs a teacher and a teacher a method: give both, or none for plain training"
    for pair in ({"methods": [Stub()]}, {"teacher": Teacher(build("detr"), tiny.LABELS)}):
        with pytest.raises(ValueError, match=message):
            Distiller(build("detr"), **pair)


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [False, True])
def test_in_eval_mode_it_is_the_student_and_no_teacher_is_called(build, family, labelled):
    distiller, method = distiller_of(build, family)
    distiller.eval()
    calls: list[int] = []
    distiller.teacher.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    inputs = tiny.batch(64, padded=distiller.adapter.uses_pixel_mask)
    expected = distiller.student(**inputs)
    found = distiller(**(inputs if labelled else {k: v for k, v in inputs.items() if k != "labels"}))
    torch.testing.assert_close(found["logits"], expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, atol=1e-5, rtol=1e-5)
    assert not calls and not method.calls
    assert not any(name.startswith(("stub", "distillation")) for name in found["parts"])
    if labelled:
        torch.testing.assert_close(found["loss"], found["parts"]["task_loss"])
    else:
        assert found["loss"] is None and found["parts"] == {}


def test_without_a_method_it_is_plain_training(build):
    distiller = Distiller(build("detr").requires_grad_(True)).train()
    found = distiller(**tiny.batch(64))
    assert all(name.startswith("task_") for name in found["parts"])
    torch.testing.assert_close(found["loss"].detach(), found["parts"]["task_loss"])
    found["loss"].backward()
    assert any(parameter.grad is not None for parameter in distiller.student.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norm_keeps_its_statistics_and_live_batch_norm_does_not(build, frozen):
    student, part = build("rt_detr").requires_grad_(True), "model.encoder_input_proj."
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(part)))
    layers = {name: module for name, module in student.named_modules() if isinstance(module, nn.BatchNorm2d)}
    before = {name: layer.running_mean.clone() for name, layer in layers.items()}
    distiller = Distiller(student).train()
    distiller(**tiny.batch(64))["loss"].backward()
    kept = {name for name, layer in layers.items() if torch.equal(layer.running_mean, before[name])}
    chosen = {name for name in layers if name.startswith(part)}
    assert chosen and chosen < layers.keys()
    assert kept == (chosen if frozen else set())
    assert student.training and not any(module.training for module in distiller.eval().modules())


def test_the_student_s_config_is_its_own(build):
    distiller, _ = distiller_of(build)
    assert distiller.config is distiller.student.config


# --- step and seed ---------------------------------------------------------------------------------------------------


def test_step_and_seed_alone_drive_the_method_s_random_numbers(build):
    draws = {}
    for seed in range(4):
        distiller, method = distiller_of(build, seed=seed)
        for step in range(4):
            distiller(**tiny.batch(32, boxes=(1,)), step=step)
            draws[seed, step] = tuple(method.calls[-1]["draw"].tolist())
    assert len(set(draws.values())) == 16
    torch.manual_seed(99)  # another process: its own random state and images
    distiller, method = distiller_of(build, seed=2)
    distiller(**tiny.batch(64, boxes=(0, 3, 1), seed=5), step=3)
    assert tuple(method.calls[-1]["draw"].tolist()) == draws[2, 3]


def test_general_points_change_every_step_and_follow_the_seed(build):
    teacher = Teacher(tiny.build("detr", seed=1), tiny.LABELS)

    def parts(seed: int, step: int) -> dict[str, Tensor]:
        student = build("detr").requires_grad_(True)
        method = KDDETR(KDDETRConfig(general_points=10), adapter_for(student).spec, teacher.spec)
        return Distiller(student, teacher, [method], seed=seed).train()(**tiny.batch(64), step=step)["parts"]

    base, again, later, other = parts(0, 0), parts(0, 0), parts(0, 1), parts(1, 0)
    for part in ("class", "box", "giou"):
        general, specific = f"kd_detr_{part}_general", f"kd_detr_{part}_specific"
        assert torch.equal(base[general], again[general])
        assert len({float(found[general]) for found in (base, later, other)}) == 3
        assert all(torch.equal(base[specific], found[specific]) for found in (again, later, other))


# --- several methods, another view -----------------------------------------------------------------------------------


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
        teacher.model.base_model.register_forward_pre_hook(lambda *_: calls.append("teacher")),
        adapter_for(student).decoder.register_forward_pre_hook(lambda *_: calls.append("decoder")),
    ]

    def losses(chosen: list[DistillationMethod]) -> dict[str, Tensor]:
        distiller = Distiller(student, teacher if any(m.needs_teacher for m in chosen) else None, chosen)
        distiller.training = True
        return distiller.losses(**tiny.batch(64), step=3).distillation

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
    distiller.teacher.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    batch, view = tiny.batch(64), tiny.batch(96)["pixel_values"]
    distiller(**batch, teacher_pixel_values=view)
    distiller(**batch)
    assert [tensor.shape[-1] for tensor in seen] == [96, 64]
    assert method.calls[0]["teacher"].features["encoder"][0].values.shape[-1] == 12


@pytest.mark.parametrize("name", ["kd_detr", "detrdistill", "clockdistill"])
def test_every_method_trains_with_a_teacher_of_another_image_size(build, name):
    student, teacher = build("rt_detr").requires_grad_(True), Teacher(tiny.build("rt_detr", 64, seed=1), tiny.LABELS)
    kind = METHODS[name]
    method = kind(kind.config_class(), adapter_for(student).spec, teacher.spec)
    view = tiny.batch((96, 128))["pixel_values"]
    found = Distiller(student, teacher, [method]).train()(**tiny.batch(64), teacher_pixel_values=view)
    found["loss"].backward()
    assert found["loss"].isfinite()
