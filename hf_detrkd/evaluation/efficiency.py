"""Parameter count, FLOPs, latency and throughput of a detector."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel


WARM_UP = 2  # untimed passes of each model before the timed ones
LEAST = 5  # minimum number of timed passes

Precision = Callable[[], AbstractContextManager[Any]]
"""Makes the context manager of a forward pass (autocast)."""


def measure_efficiency(
    model: PreTrainedModel, image_size: tuple[int, int], batch_sizes: Sequence[int] = (1, 8), seconds: float = 2.0
) -> dict[str, Any]:
    """Parameters, GFLOPs and latency of a detector on random images, on its device and in its precision.

    Args:
        model ([`~transformers.PreTrainedModel`]): its mode and weights are left unchanged.
        image_size (`tuple[int, int]`): height and width in pixels.
        batch_sizes (`Sequence[int]`): images per batch.
        seconds (`float`): time per batch size, without warm-up; at least five passes are timed.

    Returns:
        `dict`: `parameters` (`int`), `gflops` (of one image, see [`count_gflops`]), `image_size`, `precision` (of the
        weights) and `latency`: by batch size as text `median_ms`, `low_ms` and `high_ms` (the quartiles) of a forward
        pass, and `images_per_second` at the median.
    """
    latency = {str(size): latency_in_turns([model], image_size, size, seconds)[0] for size in batch_sizes}
    return {
        "parameters": model.num_parameters(),
        "gflops": count_gflops(model, image_size),
        "image_size": list(image_size),
        "precision": str(model.dtype).removeprefix("torch."),
        "latency": latency,
    }


def count_gflops(model: PreTrainedModel, image_size: tuple[int, int]) -> float:
    """GFLOPs (1e9 floating point operations) of a forward pass of one image, by
    [`~torch.utils.flop_counter.FlopCounterMode`].

    It counts matrix products, convolutions and attention (as its two matrix products), with multiply and add as two
    operations: twice the MACs of papers. It does not count normalisation, activations, interpolation, `grid_sample`
    (and so the sampling of deformable attention), RoIAlign and NMS.

    Args:
        model ([`~transformers.PreTrainedModel`])
        image_size (`tuple[int, int]`): height and width in pixels.
    """
    # The unfused backend, since not every version of torch counts the CPU's attention kernel.
    in_steps = sdpa_kernel(SDPBackend.MATH)
    with evaluating(model), torch.no_grad(), in_steps, FlopCounterMode(display=False) as counter:
        model(random_images(model, image_size, 1))
    return counter.get_total_flops() / 1e9


def latency_in_turns(
    models: Sequence[PreTrainedModel],
    image_size: tuple[int, int],
    batch_size: int,
    seconds: float = 2.0,
    precision: Precision = nullcontext,
) -> list[dict[str, float]]:
    """Latency of several detectors, timed in turns so that other load on the machine affects all of them alike.

    Args:
        models (`Sequence` of [`~transformers.PreTrainedModel`]): on one device.
        image_size (`tuple[int, int]`): height and width in pixels.
        batch_size (`int`): images per batch.
        seconds (`float`): time per model, without warm-up; at least five passes are timed.
        precision: context manager of each pass, such as `lambda: torch.autocast("cuda", torch.bfloat16)`.

    Returns:
        `list[dict[str, float]]`: for each model `median_ms`, `low_ms` and `high_ms` (the quartiles), and
        `images_per_second` at the median.
    """

    def pass_of(model: PreTrainedModel) -> Callable[[], None]:
        images = random_images(model, image_size, batch_size)
        wait = nothing if images.device.type == "cpu" else torch.accelerator.synchronize

        def one() -> None:
            with precision():
                model(images)
            wait()

        return one

    with evaluating(*models), torch.inference_mode():
        times = time_in_turns([pass_of(model) for model in models], LEAST, seconds * len(models))
    return [figures_of(seen, batch_size) for seen in times]


def nothing() -> None:
    """No-op synchronisation for CPU."""


def time_in_turns(passes: Sequence[Callable[[], Any]], least: int, seconds: float = 0.0) -> list[list[float]]:
    """Seconds of each pass of several functions, called in turns after a warm-up: at least `least` times each, and
    until `seconds` have passed."""
    for _ in range(WARM_UP):
        for one in passes:
            one()
    times: list[list[float]] = [[] for _ in passes]
    begun = time.perf_counter()
    while len(times[0]) < least or time.perf_counter() - begun < seconds:
        for one, seen in zip(passes, times, strict=True):
            started = time.perf_counter()
            one()
            seen.append(time.perf_counter() - started)
    return times


def figures_of(times: Sequence[float], batch_size: int) -> dict[str, float]:
    """Median and quartiles of the passes in milliseconds, and images per second at the median."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {
        "median_ms": 1e3 * median,
        "low_ms": 1e3 * low,
        "high_ms": 1e3 * high,
        "images_per_second": batch_size / median,
    }


def random_images(model: PreTrainedModel, image_size: tuple[int, int], batch_size: int) -> torch.Tensor:
    """Pixels `(batch_size, 3, height, width)` in [0, 1], the same in every call, in the model's device and dtype."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch_size, 3, *image_size, generator=generator).to(model.device, model.dtype)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Sets models to eval mode and freezes them; on exit restores every module and parameter.

    They are frozen since the counter's hooks fail on views of parameters that require a gradient (LW-DETR's queries).
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    trained = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    try:
        for model in models:
            model.eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trained:
            parameter.requires_grad_(True)


def device_name(device: torch.device | str | None = None) -> str:
    """Name of a device: `NVIDIA A100-SXM4-40GB`, or `AMD EPYC 7B13, 2 threads`.

    Args:
        device (`torch.device` or `str`, *optional*): default: the GPU if there is one.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type == "cuda":
        return torch.cuda.get_device_name(kind)
    if kind.type != "cpu":
        return f"{kind.type} of {_processor()}"
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    """The CPU's model, from Linux's `/proc/cpuinfo` or else from Python."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB since the start: of the GPU on CUDA, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # Windows has no such module

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
