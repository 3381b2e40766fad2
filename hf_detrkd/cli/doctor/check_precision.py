"""The doctor's check of the teacher's precision: processors without 16-bit instructions emulate them, very slowly."""

import time

import torch
import torch.nn.functional as F

from .findings import Report


SLOWER = 1.5  # times float32, above which a 16-bit teacher does not pay


def check_precision(report: Report, dtype: torch.dtype, device: torch.device) -> None:
    """Compares the teacher's 16-bit type with float32 on a CPU; GPUs that run torch have the instructions."""
    if device.type != "cpu" or dtype == torch.float32:
        return
    name, ratio = str(dtype).removeprefix("torch."), seconds_of(dtype) / seconds_of(torch.float32)
    report.facts["teacher_dtype"] = {"dtype": name, "relative_time": ratio}
    if ratio > SLOWER:
        report.warning(
            "precision",
            f"this processor computes a matrix product {ratio:.1f} times slower in {name} than in float32: pass "
            "--teacher_dtype float32.",
        )


def seconds_of(dtype: torch.dtype, size: int = 512, tries: int = 5) -> float:
    """Seconds of the fastest of some products of square matrices."""
    matrix, seconds = torch.ones(size, size, dtype=dtype), []
    for _ in range(tries):
        start = time.perf_counter()
        F.linear(matrix, matrix)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
