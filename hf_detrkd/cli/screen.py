"""What a command says of mistakes: one sentence, and the traceback only with `--debug`."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..training.stopping import RunStopped
from .shipped import PACKAGE


MISTAKES = (ValueError, OSError, ImportError, FloatingPointError)
"""Errors that a user can correct; every other one keeps its traceback."""
LOST = re.compile(r"closed by peer|reset by peer|Connection refused|NCCL (error|timeout)|Broken pipe", re.IGNORECASE)
"""What the other processes say when one has ended."""
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

    _file: str | None = None  # whose words are parsed

    def parse_args_into_dataclasses(
        self, args: Any = None, return_remaining_strings: bool = False, **options: Any
    ) -> tuple:
        *found, rest = super().parse_args_into_dataclasses(args, True, **options)
        if rest and not return_remaining_strings:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return (*found, rest) if return_remaining_strings else tuple(found)

    def words_of(self, recipe: Mapping[str, Any], file: str) -> list[str]:
        """The arguments of a recipe as words of a command line, which are converted and checked like these; what is no
        word (a dict, an empty value) becomes the default.

        Args:
            recipe (`dict[str, Any]`): values by argument, as from YAML.
            file (`str`): in messages.

        Raises:
            ValueError: a value does not fit its argument.
        """
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)
        words = []
        for name, value in recipe.items():
            action = actions[name]
            many, texts = action.nargs in ("+", "*"), action.type not in (int, float, string_to_bool)
            if isinstance(value, dict) or (isinstance(value, list) and not many):
                if many or not texts:
                    raise ValueError(f"{file} sets {name} to {value!r:.80}, which is no single value.")
                self.set_defaults(**{name: value})
            elif value is None or value == []:
                if many or texts or self.get_default(name) is None:
                    self.set_defaults(**{name: value})
                else:
                    raise ValueError(f"{file} sets {name} to nothing: leave the line out for the default.")
            elif isinstance(value, list):
                words += [action.option_strings[0], *map(_word, value)]
            else:
                words.append(f"{action.option_strings[0]}={_word(value)}")
        self._file = file
        self.parse_args(words)
        self._file = None
        return words

    def error(self, message: str) -> NoReturn:
        if self._file is not None:
            raise ValueError(f"{self._file}: {message.replace('argument --', '')}.")
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


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
