"""Fixtures that every room's tests share: one thread, a seed per test, tiny detectors as copies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers

from tests import seed_all, tiny


torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whatever ran before."""
    seed_all()
    return 0


@pytest.fixture
def build() -> Callable[..., transformers.PreTrainedModel]:
    """`tiny.build`."""
    return tiny.build


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Runs a test once per detector family."""
    return request.param


@pytest.fixture(params=tiny.ASKABLE)
def askable(request: pytest.FixtureRequest) -> str:
    """Runs a test once per family whose decoder takes queries from outside."""
    return request.param
