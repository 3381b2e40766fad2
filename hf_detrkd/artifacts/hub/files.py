"""Selects the files to upload and snapshots them so that training may overwrite the originals."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml
from transformers.trainer_utils import HubStrategy

from ..redaction import portable
from ..run_folder import FACTS, PRECISION, RECIPE, RESULTS, STATE, SUMMARY, read_json, read_recipe
from ..whole_checkpoints import MANIFEST, checkpoints_of, newest_whole


STUDENT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
)
RUN_FILES = ("README.md", RECIPE, RESULTS, SUMMARY, FACTS, PRECISION, "teacher_results.json", "*.png", "report.html")
CHECKPOINT_FILES = (
    *STUDENT_FILES,
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", STATE, MANIFEST),
    *("distillation/method.json", "distillation/method.safetensors", "distillation/trained_student.safetensors"),
)
"""What resuming needs, without the pickled arguments, which hold the machine's paths."""
LINKED = 2**24  # bytes; files of this size or larger are linked
STAGE = ".push-"  # folders of links and copies, inside the output folder since links need the same disk


class Part(NamedTuple):
    """One commit: patterns of files in a folder, and their folder in the repository."""

    source: Path
    names: Iterable[str]
    path_in_repo: str | None = None


def parts_of(folder: Path, strategy: str | None) -> list[Part]:
    """All commits of a strategy for the output folder of a finished run, the student last."""
    checkpoints = []
    if strategy == HubStrategy.CHECKPOINT and (last := newest_whole(folder)[0]) is not None:
        checkpoints = [Part(last, CHECKPOINT_FILES, "last-checkpoint")]
    if strategy == HubStrategy.ALL_CHECKPOINTS:
        checkpoints = [Part(one, CHECKPOINT_FILES, one.name) for one in reversed(checkpoints_of(folder))]
    return [*checkpoints, Part(folder, (*STUDENT_FILES, *RUN_FILES))]


def staged(part: Part, folder: Path) -> Path:
    """A snapshot folder of the files as they are now, with local paths removed from the recipe.

    Large files are linked, since weights are always written to new files; small ones, which may be overwritten, are
    copied.

    Args:
        part ([`Part`])
        folder (`Path`): parent of the new folder.
    """
    stage = Path(tempfile.mkdtemp(prefix=f"{_own_prefix()}{os.getpid()}-", dir=folder))
    for file in sorted({file for name in part.names for file in part.source.glob(name) if is_own(file, part.source)}):
        goal = stage / file.relative_to(part.source)
        goal.parent.mkdir(parents=True, exist_ok=True)
        _bring(file, goal)
    if (stage / RECIPE).is_file():
        shown, recipe = read_json(part.source / FACTS).get("arguments"), read_recipe(stage / RECIPE)
        recipe = {name: value for name, value in recipe.items() if not shown or name in shown}
        (stage / RECIPE).write_text(yaml.safe_dump(portable(recipe), sort_keys=False))
    return stage


def is_own(file: Path, folder: Path) -> bool:
    """True for a regular file inside a folder; a link may lead to anything on the machine."""
    inside = file.resolve() == folder.resolve() / file.relative_to(folder)
    return inside and file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _bring(file: Path, goal: Path) -> None:
    if file.stat().st_size >= LINKED:
        try:
            return os.link(file, goal)
        except OSError:  # a file system without links
            pass
    shutil.copy2(file, goal)


def remove_stages(folder: Path) -> None:
    """Removes the snapshots of killed processes of this machine."""
    for left in folder.glob(f"{_own_prefix()}*"):
        process = left.name.removeprefix(_own_prefix()).partition("-")[0]
        if not process.isdigit() or not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _own_prefix() -> str:
    return f"{STAGE}{socket.gethostname()}-"
