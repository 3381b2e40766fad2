"""Reads text files that people wrote on any system."""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path
from typing import Any

import yaml

from .errors import DatasetError
from .garbage import without_garbage_collection


POINTER = b"version https://git-lfs.github.com/spec/"
IS_POINTER = "is a Git LFS pointer and not the file itself: run `git lfs pull` in its repository"


def there(name: str | os.PathLike[str]) -> bool:
    """True if a name that someone gave is a file or folder here; one that no file can have is not."""
    return os.path.exists(os.path.expanduser(name))


def is_lfs_pointer(content: bytes) -> bool:
    """True if a file holds what Git LFS leaves in a clone without its files."""
    return content.startswith(POINTER)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, or in UTF-16.

    Raises:
        `DatasetError`: it is a Git LFS pointer, or in another encoding.
    """
    content = path.read_bytes()
    if is_lfs_pointer(content):
        raise DatasetError(f"{path} {IS_POINTER}.")
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text ({error}): save it as UTF-8.") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, without spaces around them."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        `DatasetError`: the file is not JSON.
    """
    try:
        with without_garbage_collection():
            return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DatasetError(f"{path} is not JSON ({error}).") from error


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, which JSON is, too.

    Raises:
        `DatasetError`: the file is not YAML; the message names the line.
    """
    text = read_text(path)
    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise DatasetError(f"{path} is not YAML: it is nested too deeply.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        lines = text.splitlines()
        tab = mark is not None and mark.line < len(lines) and "\t" in lines[mark.line]
        why = "it has a tab, where YAML wants spaces" if tab else str(getattr(error, "problem", error)).splitlines()[0]
        raise DatasetError(f"{path}{line} is not YAML: {why}.") from error
