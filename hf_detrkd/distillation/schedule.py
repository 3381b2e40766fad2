"""How much distillation counts in the course of training: one schedule for all methods."""

from __future__ import annotations

import math
from dataclasses import dataclass


SHAPES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class DistillationSchedule:
    """A factor for the distillation losses, as a function of the optimizer step alone: a resumed run continues it.

    Args:
        shape (`str`): `"constant"`; `"linear"` or `"cosine"`, which fall from 1 to 0 at the end.
        warmup (`float`): fraction of the training over which the factor rises from 0.
        stop (`float`): fraction of the training after which there is no distillation any more, and no teacher pass.

    Raises:
        ValueError: an unknown shape, or fractions that are none or cross.

    References:
        A decay to zero is Task-adaptive regularization's (Sun et al., https://arxiv.org/abs/2006.13108).
    """

    shape: str = "constant"
    warmup: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"distillation_schedule must be one of {', '.join(SHAPES)}, got {self.shape!r}.")
        if not 0 <= self.warmup < self.stop <= 1:
            raise ValueError(
                "distillation_warmup and distillation_stop must be fractions of the training, the first below the "
                f"second, got {self.warmup} and {self.stop}."
            )

    def __call__(self, step: int, max_steps: int) -> float:
        """The factor of a step.

        Args:
            step (`int`): optimizer steps done before, from 0.
            max_steps (`int`): of the whole training.
        """
        progress = step / max(1, max_steps)
        if progress >= self.stop:
            return 0.0
        left = 1 - progress / self.stop
        factor = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[self.shape]
        # The first step already counts: a warm-up that starts at 0 would waste its teacher pass.
        return factor * (min(1.0, (step + 1) / (self.warmup * max_steps)) if self.warmup else 1.0)
