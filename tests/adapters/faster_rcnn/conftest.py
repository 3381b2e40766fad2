"""A Faster R-CNN where the contract's tests have one of the DETR line."""

from __future__ import annotations

import pytest

from hf_detrkd.adapters import DetectorAdapter, adapter_for
from tests.models.faster_rcnn import build


@pytest.fixture
def adapter() -> DetectorAdapter:
    return adapter_for(build())
