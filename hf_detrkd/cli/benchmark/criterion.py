"""`benchmark.py criterion`: compares our detection loss with transformers' own, on the same random predictions."""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from ...adapters import ADAPTERS
from .criterion_case import Case


FAMILIES = [name for name in ADAPTERS if name in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES]  # transformers' own


def seconds(loss: Callable[[], Tensor], leaves: list[Tensor], device: str) -> tuple[float, float]:
    """Time of one forward and backward pass, and the loss."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    value = loss()
    torch.autograd.grad(value, leaves, allow_unused=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, value.item()


def synchronizations(loss: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    """Number of times a step waits for the GPU, as reported by torch."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.autograd.grad(loss(), leaves, allow_unused=True)
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def measure(model_type: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measures both losses in turns on the same predictions."""
    torch.manual_seed(0)
    case = Case(model_type, given)
    times: dict[str, list[float]] = {"ours": [], "transformers": []}
    values = {}
    for step in range(given.repeats + 1):
        for name, loss in (("ours", case.ours), ("transformers", case.theirs)):
            elapsed, values[name] = seconds(loss, case.leaves, given.device)
            if step:  # the first is the warm-up
                times[name].append(elapsed * 1e3)
    found: dict[str, Any] = {f"{name}_ms": statistics.median(series) for name, series in times.items()}
    found |= {f"{name}_loss": value for name, value in values.items()}
    found["right_loss"] = case.right().item()
    found["equal"] = abs(found["ours_loss"] - found["right_loss"]) <= 1e-5 * abs(found["right_loss"])
    found["times_faster"] = found["transformers_ms"] / found["ours_ms"]
    if given.device == "cuda":
        found["ours_synchronizations"] = synchronizations(case.ours, case.leaves)
        found["transformers_synchronizations"] = synchronizations(case.theirs, case.leaves)
    return found


def criterion(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Prints the table and returns its figures."""
    results = {name: measure(name, given) for name in tqdm(given.families, desc="families", leave=False)}
    print("| family | transformers, ms | ours, ms | times faster | loss of transformers | ours | equal |")
    print("|---|---|---|---|---|---|---|")
    for name, row in results.items():
        equal = "yes" if row["equal"] else "NO"
        if row["right_loss"] != row["transformers_loss"]:
            equal += f", to {row['right_loss']:.3f}"
        print(
            f"| {name} | {row['transformers_ms']:.0f} | {row['ours_ms']:.0f} | {row['times_faster']:.1f} | "
            f"{row['transformers_loss']:.3f} | {row['ours_loss']:.3f} | {equal} |"
        )
    print("Equal to 1e-5; for D-FINE and DEIMv2, to transformers' loss with aligned layers: see PAPERS.md.")
    if not all(row["equal"] for row in results.values()):
        raise SystemExit("The losses differ.")
    return results
