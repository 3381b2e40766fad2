"""The parser of a command's arguments, which says a mistake in one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .help import Formatter, Titles, placeholder, sections
from .nearest import nearest


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

    def __init__(self, kinds: Any = (), titles: Titles | None = None, **options: Any):
        """
        Args:
            kinds: dataclasses of the arguments.
            titles (`dict[type, str]`, *optional*): titles of their groups in the help.
            options: further arguments of the parser.
        """
        super().__init__(kinds, **options)
        self.titles = titles or {}
        if self.add_help and self.titles:
            nothing = {"nargs": 0, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
            self.add_argument("--help_all", action=HelpAll, help="Show all arguments, and exit.", **nothing)

    def format_help(self, whole: bool = False) -> str:
        formatter = self._get_formatter()
        required = [
            " ".join([*action.option_strings[:1], placeholder(action)]) for action in self._actions if action.required
        ]
        formatter.add_usage(" ".join([self.prog, *required, "[--argument VALUE ...]"]), [], [])
        formatter.add_text(self.description)
        for section in sections(self._actions, self.dataclass_types, self.titles, whole):
            formatter.start_section(section.title)
            formatter.add_arguments(section.actions)
            if section.more:
                formatter.add_text(f"More, which --help_all explains: {', '.join(section.more)}.")
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

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
        hint = nearest(ours if ours in known else flag, known, "")
        return f": {hint}" if hint else "."


class HelpAll(argparse.Action):
    """`--help_all`: the help with every argument of transformers."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        assert isinstance(parser, Parser)
        print(parser.format_help(whole=True), end="")
        raise SystemExit(0)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def make_parser(kinds: Any, description: str | None, **options: Any) -> Parser:
    """The parser of a command, whose description keeps its lines.

    Args:
        kinds: dataclasses of the arguments.
        description (`str`, *optional*): the docstring of its module.
        options: further arguments of the parser.
    """
    return Parser(kinds, description=description, formatter_class=Formatter, **options)
