"""KD-DETR's losses of random detectors: what its tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_detrkd.methods import KDDETR
from hf_detrkd.structures.outputs import DetectorOutput
from hf_detrkd.structures.targets import BatchTotals
from tests import tiny
from tests.methods.fakes import targets_of


GROUPS = ("specific", "general")
TWO_STAGE = ("deformable_detr/two_stage", *tiny.DENOISING)


def compare(method: KDDETR, student: DetectorOutput, teacher: DetectorOutput, seed: int = 0) -> dict[str, Tensor]:
    targets = targets_of(*[1] * student.layers[0].boxes.shape[0])
    totals = BatchTotals.of(targets.counts, 100)
    return method(student, teacher, targets, totals, torch.Generator().manual_seed(seed))
