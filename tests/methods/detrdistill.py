"""DETRDistill's losses of random detectors: what its tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_detrkd.methods import DETRDistill, DETRDistillConfig
from hf_detrkd.structures.outputs import DetectorOutput
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests.methods.fakes import Fake


VARIANTS = ("paper", "released")
ONLY_LOGITS = {"feature_weight": 0.0, "assignment_weight": 0.0}
ONLY_FEATURE = {"logits_weight": 0.0, "assignment_weight": 0.0}
ONLY_ASSIGNMENT = {"logits_weight": 0.0, "feature_weight": 0.0}


def losses_of(student: Fake, teacher: Fake, targets: Targets, **options: Any) -> dict[str, Tensor]:
    method = DETRDistill(DETRDistillConfig(**options), student.spec, teacher.spec)
    return compare(method, student.output, teacher.output, targets)


def compare(method: DETRDistill, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict:
    totals = BatchTotals.of(targets.counts, student.layers[0].boxes.shape[1])
    return method(student, teacher, targets, totals, torch.Generator())
