"""Sizes of images that a family cannot take are said before training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_detrkd.adapters import adapter_for
from hf_detrkd.data.image_size import ImageSize
from hf_detrkd.training.train_data import check_size
from tests import runs, tiny


@pytest.mark.parametrize("family", tiny.DETECTORS)
def test_a_size_is_refused_exactly_if_the_model_cannot_take_it(build, family: str) -> None:
    model = build(family)
    adapter, takes = adapter_for(model), True
    try:
        with torch.no_grad():
            adapter.encode(torch.rand(1, 3, 100, 132))
    except RuntimeError:
        takes = False
    if takes:
        check_size(adapter, ImageSize(100, 132))
    else:
        with pytest.raises(ValueError, match=r"multiples of 32 pixels, got 100x132: set --image_size 96x128"):
            check_size(adapter, ImageSize(100, 132))
    check_size(adapter, ImageSize(96, 128))


def test_a_trainer_says_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "SIZE", (100, 100))
    with pytest.raises(ValueError, match="rt_detr takes images whose sides are multiples of 32 pixels, got 100x100"):
        runs.make_trainer(tmp_path, "rt_detr")
    runs.make_trainer(tmp_path, "detr")
