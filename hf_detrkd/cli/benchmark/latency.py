"""`benchmark.py latency`: parameters, FLOPs, latency and throughput of several detectors."""

import argparse
from contextlib import AbstractContextManager
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ...data import parse_image_size
from ...evaluation.efficiency import count_gflops, device_name, latency_in_turns
from ...models.loading import load_detector


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_latency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", required=True, help="Hub ids or folders of detectors; ratios are relative to the first."
    )
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8], help="Images per batch. Default: 1 8.")
    parser.add_argument("--image_size", default="640", help="A number or HEIGHTxWIDTH in pixels. Default: 640.")
    parser.add_argument("--seconds", type=float, default=5.0, help="Seconds per model and batch size. Default: 5.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="Device to measure on. Default: cpu.")
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="Precision; 16-bit types use autocast. Default: float32."
    )
    parser.set_defaults(run=latency)


def latency(given: argparse.Namespace) -> dict[str, Any]:
    """Prints the table and returns its figures."""
    size = parse_image_size(given.image_size)
    assert size is not None  # None only for None
    models = {name: load(name, given.device) for name in given.models}

    def precision() -> AbstractContextManager[Any]:
        low = given.dtype != "float32"
        return torch.autocast(given.device, DTYPES[given.dtype] if low else None, enabled=low)

    found: dict[str, dict[str, Any]] = {
        name: {"parameters": model.num_parameters(), "gflops": count_gflops(model, size), "latency": {}}
        for name, model in models.items()
    }
    for batch in tqdm(given.batch_sizes, desc="Batch sizes", leave=False):
        turns = latency_in_turns(list(models.values()), size, batch, given.seconds, precision)
        for name, figures in zip(models, turns, strict=True):
            found[name]["latency"][str(batch)] = figures
    print(f"{device_name(given.device)}, {given.dtype}, {size[0]}x{size[1]} pixels; median and quartiles")
    print(latency_table(found))
    return {"device": device_name(given.device), "dtype": given.dtype, "image_size": list(size), "models": found}


def load(name: str, device: str) -> PreTrainedModel:
    return load_detector(name).to(device)


def latency_table(found: dict[str, dict[str, Any]]) -> str:
    """One row for each model and batch size, with the ratio to the first model in parentheses."""
    lines = ["| model | parameters | GFLOPs | batch | ms | images / s |", "|---|---|---|---|---|---|"]
    first = next(iter(found.values()))
    for name, row in found.items():
        for batch, figures in row["latency"].items():
            base = first["latency"][batch]
            cells = [
                f"{row['parameters'] / 1e6:.2f} M{share(row['parameters'], first['parameters'], row is first)}",
                f"{row['gflops']:.3g}{share(row['gflops'], first['gflops'], row is first)}",
                batch,
                f"{figures['median_ms']:.1f} [{figures['low_ms']:.1f}, {figures['high_ms']:.1f}]"
                + share(figures["median_ms"], base["median_ms"], row is first),
                f"{figures['images_per_second']:.1f}"
                + share(figures["images_per_second"], base["images_per_second"], row is first),
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def share(value: float, of: float, is_first: bool) -> str:
    """The ratio in parentheses; empty for the first model."""
    return "" if is_first else f" ({value / of:.2f})"
