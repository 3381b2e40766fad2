"""Processes of tests without the seconds that torch and transformers take to import.

A server process imports everything once and forks: see [`multiprocessing`'s "forkserver"].
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests import ROOT


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["hf_detrkd.cli.distill", "hf_detrkd.evaluation.metric", "tests.runs"])
SECONDS = 240


def start(
    function: Callable[..., Any], arguments: Sequence[Any], log: Path, environment: Mapping[str, str] | None = None
) -> Any:
    """Starts a function in a process of its own, whose output goes to a file.

    Args:
        function (`Callable`): of a module; its arguments can be pickled.
        arguments (`Sequence`)
        log (`Path`)
        environment (`dict[str, str]`, *optional*): variables to set.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    process = SERVER.Process(target=_work, args=(function, arguments, str(log), dict(environment or {})))
    process.start()
    return process


def finish(process: Any, log: Path) -> str:
    """Waits for a process and returns its output; a failed one fails the test."""
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0, f"exit status {process.exitcode}\n{log.read_text()[-3000:]}"
    return log.read_text()


def _work(function: Callable[..., Any], arguments: Sequence[Any], log: str, environment: dict[str, str]) -> None:
    """In the new process: the function, then an exit at once, since torch's process groups may abort at the end."""
    os.environ.update(environment)
    os.chdir(ROOT)
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    gc.freeze()
    status = 0
    try:
        function(*arguments)
    except BaseException as error:
        traceback.print_exc()
        status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    with contextlib.suppress(ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
