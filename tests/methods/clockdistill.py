"""CLoCKDistill's losses of random detectors: what its tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_detrkd.methods import CLoCKDistill, CLoCKDistillConfig
from hf_detrkd.structures.outputs import DetectorOutput
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import tiny
from tests.methods.fakes import Fake


ONLY_MEMORY = {"target_queries_weight": 0.0}
ONLY_QUERIES = {"memory_weight": 0.0}
PLACELESS = ("detr", "table-transformer", "yolos")
PLACED = tuple(name for name in tiny.FAMILIES if name not in PLACELESS)


def compare(method: CLoCKDistill, student: DetectorOutput, teacher: DetectorOutput, targets: Targets) -> dict:
    return method(student, teacher, targets, BatchTotals.of(targets.counts, 100), torch.Generator())


def losses_of(student: Fake, teacher: Fake, targets: Targets, **options: Any) -> dict[str, Tensor]:
    method = CLoCKDistill(CLoCKDistillConfig(**options), student.spec, teacher.spec)
    return compare(method, student.output, teacher.output, targets)
