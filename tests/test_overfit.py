"""Every family learns eight images by heart: the loss falls by 80 %. Minutes on one core: `make slow`."""

from __future__ import annotations

import pytest

from hf_detrkd.adapters import adapter_for
from tests import tiny
from tests.overfit import STEPS, images, overfit


def learn(family: str, steps: int, learning_rate: float = 1e-3, theirs: bool = False, seed: int = 0) -> list[float]:
    pixels, targets, classes = images()
    adapter = adapter_for(tiny.build(family, 64, seed=seed, id2label=classes).requires_grad_(True))
    return overfit(adapter, pixels, targets, steps, learning_rate, theirs, enough=0.2)


@pytest.mark.slow
def test_the_loss_on_eight_images_falls_by_four_fifths(family: str) -> None:
    steps = STEPS.get(family, 300)
    losses = learn(family, steps, 2e-3 if steps > 500 else 1e-3)
    assert losses[-1] <= 0.2 * losses[0], losses


@pytest.mark.slow
def test_two_stage_deformable_detr_learns_them_with_our_loss_and_not_with_that_of_transformers() -> None:
    ours, theirs = (learn("deformable_detr/two_stage", 200, theirs=flag) for flag in (False, True))
    assert ours[-1] <= 0.2 * ours[0]
    assert theirs[-1] > 0.3 * theirs[0]
