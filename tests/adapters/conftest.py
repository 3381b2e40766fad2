"""Adapters of every family, as the tests of their contract take them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import transformers

from hf_detrkd.adapters import DetectorAdapter, adapter_for


@pytest.fixture
def adapter(build: Callable[..., transformers.PreTrainedModel], family: str) -> DetectorAdapter:
    return adapter_for(build(family).requires_grad_(True))


@pytest.fixture
def askable_adapter(build: Callable[..., transformers.PreTrainedModel], askable: str) -> DetectorAdapter:
    return adapter_for(build(askable).requires_grad_(True))
