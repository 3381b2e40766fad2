"""A distiller with a method whose losses are easy to foretell: what its tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_detrkd.distiller import Distiller
from hf_detrkd.matching import Assigning
from hf_detrkd.methods import DistillationMethod
from hf_detrkd.outputs import DetectorOutput
from hf_detrkd.questions import Questions, Replies
from hf_detrkd.targets import BatchTotals, Targets
from hf_detrkd.teacher import Teacher
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

    def questions(
        self, student: DetectorOutput, teacher: DetectorOutput, targets: Targets, generator: torch.Generator
    ) -> Questions:
        self.calls.append({"draw": torch.randn(4, generator=generator)})
        return Questions()

    def steps(
        self,
        student: DetectorOutput,
        teacher: DetectorOutput,
        replies: Replies,
        targets: Targets,
        totals: BatchTotals,
    ) -> Assigning[dict[str, Tensor]]:
        yield []
        self.calls[-1] |= {"student": student, "teacher": teacher, "targets": targets, "totals": totals}
        mean = student.layers[-1].boxes.mean()
        return {
            "stub_one_0": self.scale,
            "stub_one_1": 2 * mean,
            "stub_two_left_0": self.scale * 10,
            "stub_two_right_0": mean * 0 + 100,
        }


def distiller_of(build: Any, family: str = "detr", **options: Any) -> tuple[Distiller, Stub]:
    method = Stub()
    teacher = Teacher(tiny.build(family, seed=1), tiny.LABELS)
    return Distiller(build(family).requires_grad_(True), teacher, [method], **options).train(), method
