"""The help of a command: arguments in groups, each once, with its default."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


Titles = Mapping[type, str]

HELP = {"-h", "--help", "--help_all"}

TRAINING = "training (transformers.TrainingArguments)"

OFTEN = {
    *("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16", "torch_compile", "seed"),
    *("activation_checkpointing", "auto_find_batch_size", "dataloader_num_workers", "eval_strategy", "eval_steps"),
    *("save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end", "metric_for_best_model"),
    *("logging_steps", "report_to", "run_name", "resume_from_checkpoint", "use_cpu", "fsdp", "deepspeed"),
    *("push_to_hub", "hub_model_id", "hub_private_repo"),
}
"""Arguments of `TrainingArguments` whose help is always shown; of the others it shows the names."""

CLEARER = {
    "hub_private_repo": "Whether the repository is created as a private one. Default: true.",
    "resume_from_checkpoint": "true: go on from the last complete checkpoint, or begin if there is none; or the "
    "folder of a checkpoint.",
}
"""Texts for arguments of `TrainingArguments` that mean something else, or more, here."""

LONGEST_CHOICE = 60  # characters of `{a,b,c}`, above which the help shows a placeholder


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, shows one spelling of an option, and defaults that the text leaves out."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, max_help_position=32, **options)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "-" not in name[2:]]
        value = "" if action.nargs == 0 else f" {self._format_args(action, '')}"
        return ", ".join(names) + value

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        return lambda number: (placeholder(action),) * number

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        shown = default not in (None, argparse.SUPPRESS, "") and action.nargs != 0
        if not shown or "default" in text.lower() or not isinstance(default, str | int | float):
            return text
        return f"{text} Default: {str(default).lower() if isinstance(default, bool) else default}."


@dataclass
class Section:
    """A group of a help: its title, its arguments, and the names of those that are left out."""

    title: str
    actions: list[argparse.Action]
    more: list[str]


def sections(actions: Iterable[argparse.Action], kinds: Iterable[Any], titles: Titles, whole: bool) -> list[Section]:
    """The arguments in groups, in the order of their dataclasses; first those of no dataclass, last those of
    `TrainingArguments`. An argument of several dataclasses belongs to the first.

    Args:
        actions (`Iterable[argparse.Action]`): all arguments of the parser.
        kinds: dataclasses of the arguments.
        titles (`dict[type, str]`): titles by dataclass. An inherited field has the title of the class that declares
            it, where there is one.
        whole (`bool`): show every argument of `TrainingArguments`, not only those that are often used.
    """
    places: dict[str, str] = {}
    for kind in kinds:
        for field in dataclasses.fields(kind):
            places.setdefault(field.name, _title(kind, field.name, titles))
    order = ["options", *sorted(dict.fromkeys(places.values()), key=TRAINING.__eq__)]
    found = {title: Section(title, [], []) for title in order}
    for action in actions:
        title = places.get(action.dest, "options")
        action.help = CLEARER.get(action.dest, action.help)
        if action.nargs == 0 and title != "options":
            continue  # the `--no_` of an argument that has its own line
        if title == TRAINING and action.dest not in OFTEN and not whole:
            found[title].more.append(action.dest)
        else:
            found[title].actions.append(action)
    return [section for section in found.values() if section.actions or section.more]


def _title(kind: type, name: str, titles: Titles) -> str:
    declares = next(c for c in reversed(kind.__mro__) if name in vars(c).get("__annotations__", ()))
    if declares.__name__ == "TrainingArguments":
        return TRAINING
    return titles.get(declares, titles.get(kind, "arguments"))


def placeholder(action: argparse.Action) -> str:
    """What stands for the value of an argument."""
    if action.choices is not None:
        choices = "{" + ",".join(map(str, action.choices)) + "}"
        return choices if len(choices) <= LONGEST_CHOICE else "NAME"
    if action.metavar is not None:
        return str(action.metavar)
    # By its name, for it is transformers', which `hf-detrkd` imports only where a command needs it.
    if getattr(action.type, "__name__", None) == "string_to_bool":
        return "true|false"
    return {int: "N", float: "X"}.get(action.type, action.dest.rpartition("_")[2].upper())  # type: ignore[call-overload]
