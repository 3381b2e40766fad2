"""transformers' loss of D-FINE and DEIMv2 with its layers aligned, of a whole model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor


_spec = importlib.util.spec_from_file_location(
    "benchmark_criterion_aligned", Path(__file__).parent.parent / "scripts/benchmark_criterion_aligned.py"
)
assert _spec is not None and _spec.loader is not None
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)
aligned_parts = benchmark.aligned_parts


def aligned_loss(model: transformers.PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """The loss of a training step."""
    return sum(aligned_parts(model.config, model(**inputs), inputs["labels"]).values())
