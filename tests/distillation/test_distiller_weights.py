"""Weights of the distiller's losses, by their keys."""

from __future__ import annotations

import pytest
import torch

from hf_detrkd.adapters import adapter_for
from hf_detrkd.distillation.distiller import Distiller
from hf_detrkd.distillation.teacher import Teacher
from hf_detrkd.methods import KDDETR, DETRDistill, DETRDistillConfig, KDDETRConfig
from hf_detrkd.structures.loss_key import LossKey
from tests import tiny
from tests.distillation.distillers import distiller_of


NAMES = [
    LossKey("stub", part, group, layer)
    for part, group in (("one", None), ("two", "left"), ("two", "right"))
    for layer in (0, 1)
]


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
    parts = distiller(tiny.batch(64))["parts"]
    torch.testing.assert_close(parts["distillation_loss"], torch.tensor(300.0))


@pytest.mark.parametrize("key", ["stub_three", "left", "two", "stub_one_left_x", "stub_one_0_0", "task_loss"])
def test_a_key_that_begins_no_loss_is_refused_with_the_names_of_the_parts(build, key):
    known = "stub_one, stub_two, stub_one_left, stub_one_right, stub_two_left, stub_two_right"
    with pytest.raises(
        ValueError, match=f"No loss of this run starts with the key '{key}' of loss_weights: they are {known}"
    ):
        distiller_of(build, loss_weights={key: 1.0})


@pytest.mark.parametrize("config", [KDDETRConfig(), DETRDistillConfig(), DETRDistillConfig(variant="released")])
def test_every_loss_of_every_method_has_its_part_s_weight(build, config):
    student = build("rt_detr").requires_grad_(True)
    teacher = Teacher(tiny.build("rt_detr", seed=1), tiny.LABELS)
    method_class = KDDETR if isinstance(config, KDDETRConfig) else DETRDistill
    method = method_class(config, adapter_for(student).spec, teacher.spec)
    distiller = Distiller(student, teacher, [method], {f"{method.name}_": 0.5}).train()
    parts = distiller(tiny.batch(64))["parts"]
    own = [value for name, value in parts.items() if name.startswith(method.name)]
    assert len(own) >= 6
    torch.testing.assert_close(parts["distillation_loss"], 0.5 * sum(own))


def test_weights_without_a_method_are_refused(build):
    message = "No loss of this run starts with the key 'stub' of loss_weights: they are none, since there is no method"
    with pytest.raises(ValueError, match=message):
        Distiller(build("detr"), loss_weights={"stub": 1.0})
