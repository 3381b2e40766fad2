"""transformers' own losses as they are meant to be, in versions that still have a fault of theirs."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.loss import loss_rt_detr, loss_utils

from hf_detrkd.cli.benchmark.criterion_case import drops_denoising


def without_denoising(
    logits: Any, labels: Any, device: Any, boxes: Any, config: Any, *args: Any, **kwargs: Any
) -> Any:
    """RT-DETR's loss, its last layer without denoising queries."""
    last = slice(-config.num_queries, None)
    return loss_rt_detr.RTDetrForObjectDetectionLoss(
        logits[:, last], labels, device, boxes[:, last], config, *args, **kwargs
    )


@pytest.fixture(autouse=True)
def repaired_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    if not drops_denoising():
        for name in ("RTDetrForObjectDetection", "RTDetrV2ForObjectDetection"):
            if name in loss_utils.LOSS_MAPPING:
                monkeypatch.setitem(loss_utils.LOSS_MAPPING, name, without_denoising)
