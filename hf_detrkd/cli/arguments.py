"""Parses the arguments of a run from a recipe and the command line."""

import argparse
import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..artifacts.redaction import is_secret
from ..data import AugmentationConfig
from ..data.text import read_yaml, there
from ..methods import METHODS
from ..training.config import DistillationConfig, method_names
from .help import HELP
from .nearest import nearest
from .parser import make_parser
from .script_arguments import DataArguments, ScriptArguments, StudentArguments
from .shipped import recipes, shipped
from .training_defaults import given_arguments, training_defaults


NO_DATA = "Say which data set: --dataset_name path/to/folder, a Hub id, or shapes for generated images."
TITLES = {
    DataArguments: "data",
    StudentArguments: "student",
    ScriptArguments: "run",
    AugmentationConfig: "augmentation",
    DistillationConfig: "teacher and distillation",
}
"""Titles of groups in the help."""

ONCE = {"config", "dry_run", "overwrite_output_dir"}  # belong to a command, not to a recipe
PLAIN = (str, int, float, bool, list, dict, type(None))  # types that a recipe can contain


@dataclass(frozen=True)
class Arguments:
    """All arguments of a run; `methods` are the configs of methods, `recipe` the arguments that were given or that
    differ from their defaults."""

    script: ScriptArguments
    augmentation: AugmentationConfig
    config: DistillationConfig
    methods: list[Any]
    recipe: dict[str, Any]
    values: dict[str, Any]
    defaults: dict[str, Any]

    @classmethod
    def of(
        cls, kinds: list[Any], values: dict[str, Any], defaults: dict[str, Any], given: Iterable[str] = ()
    ) -> "Arguments":
        kept = defaults.keys() - ONCE
        # What was given is kept although it is the default: it may take the place of others.
        recipe = {n: value for n, value in values.items() if n in kept and (n in given or value != defaults[n])}
        made: list[Any] = [made_of(kind, values) for kind in kinds]
        script, config = made[0], made[2]
        check_streaming(script, config)
        more = script.unlabeled_dataset_name is not None or script.labeled_fraction is not None
        if more and config.needs_teacher and config.teacher_answers is None:
            raise ValueError(
                "Images without labels are taught by stored answers of the teacher: set --teacher_answers auto, or a "
                "folder of hf-detrkd answer."
            )
        return cls(script, made[1], config, made[3:], recipe, values, defaults)


def check_streaming(script: ScriptArguments, config: DistillationConfig) -> None:
    """
    Raises:
        ValueError: `--streaming` with an argument that needs a data set that can be indexed, or an argument of streams
            without it.
    """
    indexed = {
        "unlabeled_dataset_name": script.unlabeled_dataset_name,
        "labeled_fraction": script.labeled_fraction,
        "teacher_answers": config.teacher_answers,
        "augmentation_views": config.augmentation_views,
        "train_annotations_file": script.train_annotations_file,
    }
    given = [name for name, value in indexed.items() if value is not None]
    if script.streaming and given:
        raise ValueError(
            f"--{given[0]} needs training images that can be read in any order, which a stream cannot: leave out "
            "--streaming."
        )
    if script.streaming and script.check_images == "all":
        raise ValueError("--check_images all reads all images before the run: set sample or none with --streaming.")
    if script.class_names is not None and not script.streaming:
        raise ValueError("--class_names is for --streaming: other data sets are read to their end for their classes.")


def made_of(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass of arguments.

    Raises:
        ValueError: the arguments are refused, by this package or by transformers.
    """
    try:
        return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init})
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(str(error)) from error


def parse(
    argv: list[str], description: str | None = None, student: bool = True, command: str = "distill"
) -> Arguments:
    """Arguments from the recipe and the command line, which overrides it.

    Args:
        argv (`list[str]`): words of the command line.
        description (`str`, *optional*): for the help.
        student (`bool`): a student must be given.
        command (`str`): the command that is run, for the help.

    Raises:
        ValueError: unknown or invalid arguments, or no student.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    first.add_argument("--method")
    first.add_argument("--preset")
    early, _ = first.parse_known_args(argv)
    recipe = read_recipe(early.config)
    method = str(early.method or recipe.get("method", "none"))
    groups = [ScriptArguments, AugmentationConfig, DistillationConfig]
    names = method_names(method)
    for name in names:
        if name not in METHODS:
            hint = nearest(name, METHODS, f"choose of none, {', '.join(sorted(METHODS))}.")
            raise ValueError(f"There is no method {name!r}: {hint}")
    methods = [METHODS[name].config_class for name in names]
    # An option of several methods is one option for all of them.
    parser = make_parser(
        [*groups, *methods],
        description,
        prog=f"hf-detrkd {command}",
        titles=TITLES | {METHODS[name].config_class: f"method {name}" for name in names},
        conflict_handler="resolve",
        allow_abbrev=False,  # secrets are recognised by their full names
    )
    parser.add_argument("--config", help="YAML file that sets any of these arguments; the command line overrides it.")
    known = {action.dest for action in parser._actions}
    others = {f.name for m in METHODS.values() for f in dataclasses.fields(m.config_class)} - known
    recipe = {key: value for key, value in recipe.items() if key not in others}  # of methods that were not chosen
    for key in recipe.keys() - known:
        hint = nearest(key, known, f"it is not an argument of --method {method}.")
        raise ValueError(f"{early.config} sets {key!r}: {hint}")
    defaults = {name: value for name, value in vars(parser.parse_args([])).items() if name != "config"}
    if HELP & set(argv):
        parser.set_defaults(**training_defaults({}))
    if (early.preset or recipe.get("preset")) == "paper":
        parser.set_defaults(max_gradient_ratio=0.0)
        for name in names:
            parser.set_defaults(**METHODS[name].published)
    words = parser.words_of(recipe, str(early.config))
    given = given_arguments(parser, [*words, *argv], recipe)
    parser.set_defaults(**training_defaults(given))
    found = Arguments.of([*groups, *methods], vars(parser.parse_args([*words, *argv])), defaults, given)
    if student and found.script.model_name_or_path is None and found.script.config_name is None:
        raise ValueError("Give the student as --model_name_or_path (trained) or as --config_name (from scratch).")
    return found


def read_recipe(path: str | None) -> dict[str, object]:
    """The arguments from a YAML file, or from a recipe of the package by its name."""
    if path is None:
        return {}
    path = str(in_full(path))
    if not os.path.isfile(path):
        known = recipes()
        if path in known:
            return read_recipe(str(known[path]))
        hint = nearest(path, known, "`hf-detrkd recipes` lists those that come with the package.")
        raise ValueError(f"--config must be a YAML file or the name of a recipe, but {path} does not exist: {hint}")
    recipe = read_yaml(Path(path))
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must contain `argument: value` lines, got a {type(recipe).__name__}.")
    # YAML reads a bare `no` as false.
    return {
        name: "no" if value is False and name.endswith("_strategy") else in_full(value)
        for name, value in recipe.items()
    }


def in_full(value: object) -> object:
    """Expands a path in `~/`, and one in `scripts/` to the installed file if it does not exist."""
    if not isinstance(value, str):
        return value
    if value.startswith("scripts/") and not there(value) and (file := shipped(value)) is not None:
        return str(file)
    return os.path.expanduser(value) if value.startswith("~/") else value


PUBLISHED = {
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "weight_decay", "max_grad_norm", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "optim", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("warmup_ratio", "bf16", "fp16", "tf32", "seed", "data_seed", "full_determinism"),
    *("activation_checkpointing", "gradient_checkpointing", "auto_find_batch_size", "torch_compile"),
    *("eval_strategy", "eval_steps"),
    *("eval_delay", "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better", "logging_steps", "dataloader_num_workers"),
    *("dataloader_drop_last", "ignore_data_skip", "use_cpu", "ddp_find_unused_parameters", "output_dir"),
    *("run_name", "hub_strategy"),
}
"""Arguments of `TrainingArguments` that a card shows; others may hold paths, addresses or secrets."""


def published(arguments: Arguments) -> dict[str, Any]:
    """The resolved arguments that a card shows: this package's own, and those of a list."""
    kinds = [ScriptArguments, AugmentationConfig, *map(type, arguments.methods)]
    own = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    shown = own | DistillationConfig.__annotations__.keys() | PUBLISHED
    return {name: value for name, value in resolved(arguments).items() if name in shown}


def resolved(arguments: Arguments) -> dict[str, Any]:
    """Every argument with its resolved value, as a recipe without secrets."""
    found = {}
    for name, given in arguments.values.items():
        value = getattr(arguments.config, name, given)  # the config resolves some of its values
        value = value.value if isinstance(value, Enum) else value
        found[name] = value if isinstance(value, PLAIN) else given
    return {name: value for name, value in found.items() if name not in ONCE and not is_secret(name)}
