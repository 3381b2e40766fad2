"""What a run that a signal stopped raises; imports nothing heavy, for the commands that only look for it."""

from __future__ import annotations

import signal


class RunStopped(SystemExit):
    """A run that a signal stopped after it had saved a checkpoint.

    A `SystemExit`, so that a program that does not handle it ends: with 143 after SIGTERM, 130 after Ctrl-C.

    Attributes:
        message (`str`): what was saved, and how to go on.
    """

    def __init__(self, number: int, checkpoint: str, steps: int):
        super().__init__(128 + number)
        step = checkpoint.rpartition("-")[2]
        self.message = (
            f"Stopped by {signal.Signals(number).name} after step {step} of {steps}, which is saved in {checkpoint}. "
            "The same command with --resume_from_checkpoint true goes on from there."
        )
