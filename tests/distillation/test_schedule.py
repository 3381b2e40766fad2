"""The factor of distillation over a training."""

from __future__ import annotations

import math

import pytest

from hf_detrkd.distillation.schedule import DistillationSchedule


def factors(steps: int = 100, **options: object) -> list[float]:
    schedule = DistillationSchedule(**options)
    return [schedule(step, steps) for step in range(steps)]


def test_the_default_counts_always() -> None:
    assert set(factors()) == {1.0}


def test_linear_and_cosine_fall_from_one_to_zero() -> None:
    linear, cosine = factors(shape="linear"), factors(shape="cosine")
    assert linear == pytest.approx([1 - step / 100 for step in range(100)])
    assert cosine == pytest.approx([(1 + math.cos(math.pi * step / 100)) / 2 for step in range(100)])


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_after_its_end_there_is_none_and_a_decay_ends_there(shape: str) -> None:
    found = factors(shape=shape, stop=0.4)
    assert all(factor > 0 for factor in found[:40]) and not any(found[40:])
    assert shape == "constant" or found[39] < 0.03


def test_a_warm_up_rises_in_equal_steps_and_multiplies_the_shape() -> None:
    assert factors(warmup=0.1)[:12] == pytest.approx([*(step / 10 for step in range(1, 11)), 1.0, 1.0])
    plain, warm = factors(shape="linear"), factors(shape="linear", warmup=0.2)
    assert warm == pytest.approx([f * min(1, (step + 1) / 20) for step, f in enumerate(plain)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "square"}, "distillation_schedule must be one of constant, linear, cosine, got 'square'"),
        ({"warmup": 0.5, "stop": 0.5}, "the first below the second, got 0.5 and 0.5"),
        ({"warmup": -0.1}, "must be fractions of the training"),
        ({"stop": 1.5}, "must be fractions of the training"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationSchedule(**options)
