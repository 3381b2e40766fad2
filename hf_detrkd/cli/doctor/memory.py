"""Peak memory of a step, and the largest batch that fits."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import psutil
import torch


GIB = 2**30


class PeakMemory:
    """Context manager that measures the peak memory of this process on a device, in GiB.

    Args:
        device (`torch.device`)

    Attributes:
        gib (`float`): valid on exit: memory reserved by torch on a GPU, else the resident memory of the process.
    """

    def __init__(self, device: torch.device):
        self.device, self.gib, self._done = device, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.gib = torch.cuda.max_memory_reserved(self.device) / GIB
        else:
            self._done.set()
            self._thread.join()

    def _watch(self) -> None:
        process, done = psutil.Process(), False
        while not done:
            self.gib = max(self.gib, process.memory_info().rss / GIB)
            done = self._done.wait(0.005)


def memory_of(device: torch.device) -> float:
    """GiB that this process can use on a device, including what it uses already."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / GIB
    return (psutil.virtual_memory().available + psutil.Process().memory_info().rss) / GIB


def fitting_batch(peaks: Mapping[int, float], limit: float) -> int:
    """The largest batch whose memory, extrapolated linearly from two measured ones, is within a limit; 0 if none is.

    Args:
        peaks (`dict[int, float]`): GiB by batch size, for at least two sizes.
        limit (`float`): GiB.
    """
    (small, low), (large, high) = min(peaks.items()), max(peaks.items())
    slope = max((high - low) / (large - small), 1e-6)
    return max(0, int(small + (limit - low) / slope))
