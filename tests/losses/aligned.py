"""transformers' loss of D-FINE and DEIMv2 with its layers aligned, of a whole model."""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor

from hf_detrkd.cli.benchmark.criterion_aligned import aligned_parts


def aligned_loss(model: transformers.PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """The loss of a training step."""
    return sum(aligned_parts(model.config, model(**inputs), inputs["labels"]).values())
