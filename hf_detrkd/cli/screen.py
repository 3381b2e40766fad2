"""What a command says of mistakes: one sentence, and the traceback only with `--debug`."""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from ..training.run_stopped import RunStopped
from .shipped import PACKAGE


MISTAKES = (ValueError, OSError, ImportError, FloatingPointError)
"""Errors that a user can correct; every other one keeps its traceback."""
LOST = re.compile(r"closed by peer|reset by peer|Connection refused|NCCL (error|timeout)|Broken pipe", re.IGNORECASE)
"""What the other processes say when one has ended."""


def run(main: Callable[[list[str]], int | None], argv: Iterable[str] | None = None) -> int:
    """Runs a command and returns its exit status: 1 after a mistake, 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        main: the command.
        argv (*optional*): its words. Default: those of this process.
    """
    # transformers' advice to the authors of a model.
    warnings.filterwarnings("ignore", message="You'd better set embed_dim")
    words = list(sys.argv[1:] if argv is None else argv)
    words, debug = without_debug(words)
    try:
        return main(words) or 0
    except RunStopped as stop:
        print(f"\n{stop.message}", file=sys.stderr)
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except MISTAKES as error:
        tell_launcher(error)
        if debug:
            raise
        print(sentence(error), file=sys.stderr)
        return 1
    except RuntimeError as error:
        if debug or not LOST.search(str(error)) or not _process():
            raise
        print(f"{_process()}ended, because another process of this run did.", file=sys.stderr)
        return 1


def without_debug(words: list[str]) -> tuple[list[str], bool]:
    """The words without a `--debug` that has no value; with one it is an argument of transformers."""
    ours = [
        place
        for place, word in enumerate(words)
        if word == "--debug" and (place + 1 == len(words) or words[place + 1].startswith("--"))
    ]
    return [word for place, word in enumerate(words) if place not in ours], bool(ours)


def _process() -> str:
    """The process in front of its messages; empty if there is only one."""
    return f"[process {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""


def tell_launcher(error: BaseException) -> None:
    """Leaves the error for torchrun, which knows then which process failed first."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def sentence(error: BaseException) -> str:
    """An error for the screen: what happened, and where if it was not found by a check of this package."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    package = __name__.partition(".")[0]
    ours = Path(last.filename).is_relative_to(PACKAGE) or type(error).__module__.startswith(f"{package}.")
    where = "" if ours else f", in {Path(last.filename).name}, line {last.lineno}"
    kind = "" if ours else f"{type(error).__name__}: "
    return f"{_process()}error: {kind}{error}\n(--debug shows the traceback{where})"
