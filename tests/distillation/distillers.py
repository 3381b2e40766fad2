"""A distiller with a method whose losses are easy to foretell: what its tests share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_detrkd.distillation.distiller import Distiller
from hf_detrkd.distillation.teacher import Teacher
from hf_detrkd.methods import DistillationMethod
from hf_detrkd.methods.decoding import DecodedQueries, QueryRequests
from hf_detrkd.structures.loss_key import LossKey
from hf_detrkd.structures.outputs import DetectorOutput
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import tiny
from tests.methods.fakes import spec


class Stub(DistillationMethod):
    """Losses that are easy to foretell, and a record of what each call was given."""

    name, groups = "stub", ("left", "right")
    weights = {"stub_one": 2.0, "stub_two": 0.5}

    def __init__(self) -> None:
        super().__init__(None, spec(), spec())
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.calls: list[dict[str, Any]] = []

    def query_requests(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, generator: torch.Generator
    ) -> QueryRequests:
        self.calls.append({"draw": torch.randn(4, generator=generator)})
        return QueryRequests()

    def losses(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        decoded: DecodedQueries,
        targets: Targets,
        totals: BatchTotals,
        host_costs: list[np.ndarray],
    ) -> dict[LossKey, Tensor]:
        self.calls[-1] |= {"student": student, "teacher": teacher, "targets": targets, "totals": totals}
        mean = student.layers[-1].boxes.mean()
        return {
            LossKey("stub", "one", layer=0): self.scale,
            LossKey("stub", "one", layer=1): 2 * mean,
            LossKey("stub", "two", "left", 0): self.scale * 10,
            LossKey("stub", "two", "right", 0): mean * 0 + 100,
        }


def distiller_of(build: Any, family: str = "detr", **options: Any) -> tuple[Distiller, Stub]:
    method = Stub()
    teacher = Teacher(tiny.build(family, seed=1), tiny.LABELS)
    return Distiller(build(family).requires_grad_(True), teacher, [method], **options).train(), method
