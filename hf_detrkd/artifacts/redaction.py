"""Redacts secrets and local paths from everything that is published."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .whole_files import write_whole


START = r"(?i)(?<![\w-])"  # of a word: long words then cost linear time
SECRET = r"[\w-]*(?:token|secret|password|passwd|credential|(?:api|access|account|private)[_-]?key)(?:[_-][\w-]*)?"
VALUE = r"[^\s,}\"'&]+"
SECRETS = (
    (re.compile(rf"{START}(bearer|basic)\s+[\w.~+/=-]{{8,}}"), r"\1 (hidden)"),
    (re.compile(rf"{START}({SECRET}[\"']?\s*[=:]\s*[\"']?){VALUE}"), r"\1(hidden)"),
    (re.compile(rf"{START}(--{SECRET}\s+)(?!-){VALUE}"), r"\1(hidden)"),
    (re.compile(rf"(?i)([?&;](?:sig|key|auth|code|sas|[\w-]{{0,40}}signature)=){VALUE}"), r"\1(hidden)"),
    (re.compile(r"\b(?:hf_|api_org_|gh[a-z]_|github_pat_|glpat-|sk-|xox[a-z]-|AKIA)[\w-]{12,}"), "(hidden)"),
    # user and password in a URL
    (re.compile(r"(?<=://)(?:[^\s/@:]+@|[^\s/@:]+:(?!\d+(?:/|$))[^\s@]+@)"), ""),
)
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY")
LEAST = 8  # characters of a secret: shorter ones are placeholders, and occur in ordinary words
# From the root, a home folder or a drive; URLs and relative paths do not match.
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.~/\\])(?:file://)?(?:~[\w.-]*|[A-Za-z]:)?(?:(?:/|\\{1,2})[^\s/\\'\",:;=<>|]+)+[/\\]*"
)


def is_secret(name: str) -> bool:
    """True if an argument of this name holds a secret, such as `--hub-token`."""
    return re.fullmatch(rf"(?i)-*{SECRET}", name) is not None


def hidden(text: str) -> str:
    """Hides secrets in a text: values after a secret's name, strings like tokens, and tokens of the environment."""
    for value in (os.environ.get(name, "") for name in VARIABLES):
        if len(value) >= LEAST:
            text = text.replace(value, "(hidden)")
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


def portable(value: Any) -> Any:
    """Arguments or facts for publication: without secrets, and with only the last part of absolute paths.

    Args:
        value: text, number or `None`, or a dict or list of them; dict entries with a secret's name are removed.
    """
    return _changed(value, lambda text: _last_part(hidden(text)))


def under_home(value: Any) -> Any:
    """Arguments for local files: without secrets, and with `~` for the home folder."""
    home = f"{Path.home()}/"
    return _changed(value, lambda text: f"~/{t[len(home) :]}" if (t := hidden(text)).startswith(home) else t)


def portable_command(arguments: list[str]) -> str:
    """A command line for publication, quoted for a shell."""
    kept: list[str] = []
    for place, argument in enumerate(arguments):
        name, sign, value = argument.partition("=")
        if is_secret(name) or (place and argument[:1] != "-" and is_secret(arguments[place - 1])):
            continue
        kept.append(f"{name}={portable(value)}" if sign else portable(argument))
    return shlex.join(kept)


def for_shell(path: str) -> str:
    """A path quoted for a shell, with `~` for the home folder."""
    short = under_home(path)
    return f"~/{shlex.quote(short[2:])}" if short.startswith("~/") else shlex.quote(short)


def forget_machine(state: Path) -> None:
    """Removes the absolute best-checkpoint path from a saved `trainer_state.json`; `best_global_step` still identifies
    the checkpoint, wherever the run's folder is."""
    content = json.loads(state.read_text()) if state.is_file() else {}
    if Path(content.get("best_model_checkpoint") or "").is_absolute():
        write_whole(state, json.dumps(content | {"best_model_checkpoint": None}, indent=2, sort_keys=True) + "\n")


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {name: _changed(one, change) for name, one in value.items() if not is_secret(str(name))}
    if isinstance(value, (list, tuple)):
        return [_changed(one, change) for one in value]
    return change(value) if isinstance(value, str) else value


def _last_part(text: str) -> str:
    whole = re.fullmatch(r"(?:~|/|[A-Za-z]:\\).*?([^/\\]+)[/\\]*", text)  # one path, whose folders may have spaces
    if whole is not None:
        return whole[1]
    return ABSOLUTE_PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)


def shareable(args: Any) -> Any:
    """Training arguments to save with a student: without tokens, and with `~` for the home folder."""
    copied = copy.copy(args)
    for field in dataclasses.fields(copied):
        value = getattr(copied, field.name)
        setattr(copied, field.name, None if is_secret(field.name) else under_home(value))
    return copied
