"""Writes files whole or not at all, so that a full disk or a kill leaves the old content."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_whole(file: Path, content: str) -> None:
    """Writes a text file in UTF-8 under another name, and renames it."""
    make_whole(file, lambda new: new.write_text(content, encoding="utf-8"))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, see [`write_whole`]."""
    write_whole(file, as_json(content))


def as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def make_whole(file: Path, make: Callable[[Path], Any]) -> None:
    """Calls a function that writes a file, and renames the file when it is complete.

    Args:
        file (`Path`): the name that it gets.
        make (`Callable[[Path], Any]`): writes to the path that it is given.
    """
    new = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        make(new)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
