"""The doctor on a teacher in 16 bits."""

from __future__ import annotations

import pytest
import torch

from hf_detrkd.cli.doctor import check_precision as checks
from hf_detrkd.cli.doctor.findings import Report


CPU = torch.device("cpu")


def findings_for(dtype: torch.dtype, device: torch.device = CPU) -> list[str]:
    report = Report()
    checks.check_precision(report, dtype, device)
    return [one["text"] for one in report.findings]


@pytest.fixture
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 1.0, torch.bfloat16: 16.0, torch.float16: 1.2}
    monkeypatch.setattr(checks, "seconds_of", seconds.__getitem__)


@pytest.mark.usefixtures("without_instructions")
def test_a_type_that_the_processor_emulates_is_a_warning_with_the_remedy():
    (text,) = findings_for(torch.bfloat16)
    assert "16.0 times slower in bfloat16 than in float32: pass --teacher_dtype float32" in text


@pytest.mark.usefixtures("without_instructions")
def test_a_type_that_is_fast_enough_and_other_devices_are_fine():
    assert findings_for(torch.float16) == findings_for(torch.float32) == []
    assert findings_for(torch.bfloat16, torch.device("cuda")) == []


def test_the_comparison_takes_time_in_each_type():
    assert all(checks.seconds_of(dtype, size=8) > 0 for dtype in (torch.float32, torch.bfloat16))
