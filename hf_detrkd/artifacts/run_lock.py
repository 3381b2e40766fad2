"""Keeps two runs out of one output folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

from .redaction import under_home
from .whole_files import write_whole


logger = logging.get_logger(__name__)

LOCK = ".lock"  # held by the process that writes; the system frees it when that process ends in any way
OWNER = ".owner"  # who holds it, for messages


@contextmanager
def run_lock(folder: str | Path, holds: bool = True) -> Iterator[None]:
    """Holds an output folder; within one process it may be held again.

    Args:
        folder (`str` or `Path`): is created.
        holds (`bool`): false for the processes of a run that do not write.

    Raises:
        ValueError: another process holds it.
    """
    if not holds:
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    outer = not lock.is_locked
    try:
        lock.acquire()
    except Timeout as error:
        owner = (folder / OWNER).read_text() if (folder / OWNER).is_file() else "another process"
        raise ValueError(
            f"{under_home(str(folder))} is in use by another run ({owner}): choose another --output_dir, or wait."
        ) from error
    except (OSError, NotImplementedError) as error:  # a file system without locks
        logger.warning(f"{folder} cannot be locked ({error}): make sure that only one run writes to it.")
        yield
        return
    try:
        if outer:
            write_whole(folder / OWNER, f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        if outer:
            (folder / OWNER).unlink(missing_ok=True)
        lock.release()
