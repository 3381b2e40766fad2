"""What a command says of mistakes: one sentence, and the traceback only with `--debug`."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from ..training.stopping import RunStopped
from .shipped import PACKAGE


MISTAKES = (ValueError, OSError, ImportError)
"""Errors that a user can correct; every other one keeps its traceback."""
ELSEWHERE = {
    "--imgsz": "--image_size",
    "--img-size": "--image_size",
    "--epochs": "--num_train_epochs",
    "--batch": "--per_device_train_batch_size",
    "--batch-size": "--per_device_train_batch_size",
    "--batch_size": "--per_device_train_batch_size",
    "--lr": "--learning_rate",
    "--lr0": "--learning_rate",
    "--data": "--dataset_name",
    "--model": "--model_name_or_path",
    "--teacher": "--teacher_model_name_or_path",
    "--weights": "--model_name_or_path",
    "--workers": "--dataloader_num_workers",
    "--project": "--output_dir",
    "--conf": "--threshold",
    "--source": "--input",
    "--resume": "--resume_from_checkpoint",
}
"""Arguments of other tools, and ours."""


class Parser(HfArgumentParser):
    """Says a mistake in one sentence, with the nearest argument, in place of the usage."""

    def parse_args_into_dataclasses(
        self, args: Any = None, return_remaining_strings: bool = False, **options: Any
    ) -> tuple:
        *found, rest = super().parse_args_into_dataclasses(args, True, **options)
        if rest and not return_remaining_strings:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return (*found, rest) if return_remaining_strings else tuple(found)

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        flags = [word for word in unknown if word.startswith("-")]
        if flags:
            message = " ".join(f"There is no {flag}{self._hint(flag)}" for flag in flags)
        print(f"error: {message}\n(--help lists the arguments)", file=sys.stderr)
        raise SystemExit(2)

    def _hint(self, flag: str) -> str:
        known = [option for action in self._actions for option in action.option_strings]
        ours = ELSEWHERE.get(flag.partition("=")[0])
        near = [ours] if ours in known else difflib.get_close_matches(flag, known, 1)
        return f": did you mean {near[0]}?" if near else "."


def make_parser(kinds: Any, description: str | None, **options: Any) -> Parser:
    """The parser of a command, whose description keeps its lines.

    Args:
        kinds: dataclasses of the arguments.
        description (`str`, *optional*): the docstring of its module.
        options: further arguments of the parser.
    """
    return Parser(kinds, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def run(main: Callable[[list[str]], int | None], argv: Iterable[str] | None = None) -> int:
    """Runs a command and returns its exit status: 1 after a mistake, 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        main: the command.
        argv (*optional*): its words. Default: those of this process.
    """
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
        if debug:
            raise
        print(sentence(error), file=sys.stderr)
        return 1


def without_debug(words: list[str]) -> tuple[list[str], bool]:
    """The words without a `--debug` that has no value; with one it is an argument of transformers."""
    ours = [
        place
        for place, word in enumerate(words)
        if word == "--debug" and (place + 1 == len(words) or words[place + 1].startswith("--"))
    ]
    return [word for place, word in enumerate(words) if place not in ours], bool(ours)


def sentence(error: BaseException) -> str:
    """An error for the screen: what happened, and where if it was not found by a check of this package."""
    process = f"[process {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    last = traceback.extract_tb(error.__traceback__)[-1]
    package = __name__.partition(".")[0]
    ours = Path(last.filename).is_relative_to(PACKAGE) or type(error).__module__.startswith(f"{package}.")
    where = "" if ours else f", in {Path(last.filename).name}, line {last.lineno}"
    kind = "" if ours else f"{type(error).__name__}: "
    return f"{process}error: {kind}{error}\n(--debug shows the traceback{where})"
