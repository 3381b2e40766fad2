"""Checkpoints that are whole or not there: written apart, flushed, sealed with a manifest, then renamed.

A run that is killed while it saves leaves a folder `.saving` beside its checkpoints, which the next save removes.
`manifest.json` in a checkpoint lists its files with their sizes and hashes, so that a torn one is known.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)


MANIFEST = "manifest.json"
UNLISTED = {MANIFEST, TRAINING_ARGS_NAME}  # the arguments are not read again, and are never pushed
STAGING = ".saving"  # beside the checkpoints, thus on the same disk
BLOCK = 1 << 20  # bytes


def staging_of(run_folder: str | Path) -> Path:
    """The folder in which a checkpoint is written before it is renamed."""
    return Path(run_folder) / STAGING


def publish(staged: Path, final: Path) -> None:
    """Seals a written checkpoint and gives it its name; one of that name is replaced.

    Args:
        staged (`Path`): the complete checkpoint in the staging folder.
        final (`Path`): its name, on the same disk.
    """
    seal(staged)
    replaced = staged.with_name(f"replaced-{final.name}")
    if final.exists():
        final.rename(replaced)
    staged.rename(final)
    _flush(final.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def seal(folder: Path) -> None:
    """Writes the manifest of a folder after everything in it is on the disk."""
    files = {}
    for file in _files(folder):
        files[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": _hash(file)}
        _flush(file)
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2))
    for path in (folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _flush(path)


def fault_of(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; `None` for a whole one."""
    if not folder.is_dir():
        return "does not exist"
    try:
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        wanted = {name: (int(facts["size"]), str(facts["sha256"])) for name, facts in listed.items()}
    except FileNotFoundError:
        return f"has no {MANIFEST}: it was not saved to its end"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"has a {MANIFEST} that cannot be read"
    for name, (size, digest) in wanted.items():
        file = folder / name
        if not os.path.isfile(file):
            return f"lacks {name:.80}"
        if file.stat().st_size != size:
            return f"has a {name} of {file.stat().st_size} bytes in place of {size}"
        if _hash(file) != digest:
            return f"has another {name} than was saved"
    return None


def checkpoints_of(run_folder: str | Path) -> list[Path]:
    """The checkpoints of a run by their steps, the last first, whatever their files' times are."""
    found = {}
    for path in Path(run_folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and path.is_dir():
            found[int(step)] = path
    return [found[step] for step in sorted(found, reverse=True)]


def newest_whole(run_folder: str | Path) -> tuple[Path | None, dict[str, str]]:
    """The last whole checkpoint of a run, or `None`, and the faults of the later ones by name."""
    faults: dict[str, str] = {}
    for path in checkpoints_of(run_folder):
        fault = fault_of(path)
        if fault is None:
            return path, faults
        faults[path.name] = fault
    return None, faults


def resolved_checkpoint(given: str | bool | None, run_folder: str | Path) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means, checked.

    Args:
        given (`str` or `bool`, *optional*): a folder; true for the last whole checkpoint of the run.
        run_folder (`str` or `Path`): the run's output folder.

    Raises:
        ValueError: the folder is not a whole checkpoint, or the run has none.
    """
    if given in (None, False, "", "false", "False"):
        return None
    if given not in (True, "true", "True"):
        fault = fault_of(Path(str(given)))
        if fault is None:
            return str(given)
        newest, _ = newest_whole(run_folder)
        hint = "" if newest is None else f" The last whole one is {newest}."
        raise ValueError(f"The checkpoint {given} {fault}, so it cannot be resumed from.{hint}")
    newest, faults = newest_whole(run_folder)
    left = "; ".join(f"{name} {fault}" for name, fault in faults.items())
    if newest is None:
        raise ValueError(f"{run_folder} has no whole checkpoint to resume from{f' ({left})' if left else ''}.")
    if faults:
        logger.warning(f"Resuming from {newest.name}, the last whole checkpoint; left aside: {left}.")
    return str(newest)


def rotate(run_folder: str | Path, limit: int | None, kept: Collection[Path]) -> None:
    """Deletes the oldest checkpoints beyond a limit, by their steps.

    Args:
        run_folder (`str` or `Path`)
        limit (`int`, *optional*): most checkpoints that stay; `None` or 0 for all.
        kept (`Collection[Path]`): checkpoints that stay in any case: the one just saved, and the best.
    """
    paths = checkpoints_of(run_folder)
    names = {path.name for path in kept}
    surplus = len(paths) - limit if limit else 0
    for path in [path for path in reversed(paths) if path.name not in names][: max(surplus, 0)]:
        shutil.rmtree(path, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNLISTED)


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file or folder is on the disk, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # folders cannot be opened everywhere
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
