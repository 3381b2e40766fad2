"""Schedule of the distillation weight over the training, shared by all methods."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..data.checks import is_finite


SHAPES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class DistillationSchedule:
    """Factor of the distillation losses as a function of the optimizer step only, so that resumed runs continue it.

    Args:
        shape (`str`): `"constant"`; `"linear"` or `"cosine"`, which decay from 1 to 0 at `stop`.
        warmup (`float`): fraction of the training over which the factor rises linearly from 0.
        stop (`float`): fraction of the training after which distillation and the teacher's forward pass are skipped.

    Raises:
        ValueError: an unknown shape, or fractions not with 0 <= warmup < stop <= 1.

    References:
        Decay to zero: task-adaptive regularization (Sun et al., https://arxiv.org/abs/2006.13108).
    """

    shape: str = "constant"
    warmup: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.shape, str) or self.shape not in SHAPES:
            raise ValueError(f"distillation_schedule must be one of {', '.join(SHAPES)}, got {self.shape!r:.40}.")
        if not (is_finite(self.warmup) and is_finite(self.stop) and 0 <= self.warmup < self.stop <= 1):
            raise ValueError(
                "distillation_warmup and distillation_stop must be fractions of the training, the first below the "
                f"second, got {self.warmup!r:.40} and {self.stop!r:.40}."
            )

    def __call__(self, step: int, max_steps: int) -> float:
        """The factor for one step.

        Args:
            step (`int`): number of completed optimizer steps, from 0.
            max_steps (`int`): optimizer steps of the whole training.
        """
        progress = step / max(1, max_steps)
        if progress >= self.stop:
            return 0.0
        left = 1 - progress / self.stop
        factor = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[self.shape]
        # `step + 1`: a warm-up starting at exactly 0 would waste the teacher pass of the first step.
        return factor * (min(1.0, (step + 1) / (self.warmup * max_steps)) if self.warmup else 1.0)
