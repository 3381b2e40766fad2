"""Parses the arguments of a run from a recipe and the command line."""

import argparse
import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from ..artifacts.redaction import is_secret
from ..data import AugmentationConfig, parse_image_size
from ..data.detection_stream import BUFFER
from ..data.faults import SAMPLE
from ..data.text import read_yaml, there
from ..methods import METHODS
from ..training.config import DistillationConfig, method_names
from .nearest import nearest
from .parser import make_parser
from .shipped import recipes, shipped
from .training_defaults import given_arguments, training_defaults


NO_DATA = "Say which data set: --dataset_name path/to/folder, a Hub id, or shapes for generated images."
ONCE = {"config", "dry_run", "overwrite_output_dir"}  # belong to a command, not to a recipe
PLAIN = (str, int, float, bool, list, dict, type(None))  # types that a recipe can contain


@dataclass
class ScriptArguments:
    """The data set, the student, and options of the script."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, folder (COCO, KITTI, YOLO, Pascal VOC, `datasets` rows, imagefolder), or shapes, "
            "generated images. Required."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a data set on the Hub that has several. Default: its own."}
    )
    train_annotations_file: str | None = field(
        default=None,
        metadata={
            "help": "COCO JSON file of the training images, which lie in the folder --dataset_name; with "
            "--eval_annotations_file. Default: found by the layout."
        },
    )
    eval_annotations_file: str | None = field(
        default=None, metadata={"help": "The same of the evaluation images. Default: found by the layout."}
    )
    dataset_train_split: str | None = field(
        default=None, metadata={"help": "Split to train on. Default: the first of train, train2017, training."}
    )
    dataset_eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. Default: the first of validation, val, valid, val2017, dev, test."},
    )
    unlabeled_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Further training images whose labels are unknown: a folder of images, or like --dataset_name. "
            "The teacher's stored answers teach on them (--teacher_answers). Default: none."
        },
    )
    labeled_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training images that keep their labels; the others become unlabelled, and are left "
            "out of the control. The choice is the same for every --seed. Default: all keep them."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training images of a Hub id, or of Parquet, Arrow or WebDataset files, while training, "
            "in endless passes, instead of preparing the data set first; needs --max_steps. Default: false."
        },
    )
    shuffle_buffer_size: int = field(
        default=BUFFER,
        metadata={
            "help": "With --streaming, number of rows that each process (or worker of --dataloader_num_workers) holds "
            f"in memory, undecoded, and draws the next one from. Default: {BUFFER}."
        },
    )
    class_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "With --streaming, the class names of a data set whose categories are no `ClassLabel`: all names "
            "that occur, or those of the numbers 0, 1, ... Default: those of the `ClassLabel`."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Maximum number of images to train on. Default: all."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Maximum number of images to evaluate on. Default: all."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Delete the run that --output_dir holds, and begin anew. Default: false."},
    )
    skip_unreadable_images: bool = field(
        default=False,
        metadata={"help": "Drop and count images that are unreadable or missing instead of stopping. Default: false."},
    )
    check_images: str = field(
        default="sample",
        metadata={
            "help": "Images that are read before the run, so that it does not stop at one that is unreadable or has "
            f"another size: all, sample ({SAMPLE} of each split) or none. Default: sample."
        },
    )
    max_image_pixels: int | None = field(
        default=None,
        metadata={
            "help": "Largest image that is read, in pixels, for scans and satellite images. Default: Pillow's limit, "
            "179 million."
        },
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of the student."})
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the student on the Hub. Default: main."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Config of a student to train from scratch: Hub id, folder or JSON file."}
    )
    backbone_weights: str | None = field(
        default=None,
        metadata={
            "help": "Safetensors file of a classifier, with weights for the backbone of --config_name. BatchNorm of a "
            "Faster R-CNN is then frozen, unless its config has frozen_batch_norm false."
        },
    )
    detections: str | None = field(
        default=None,
        metadata={
            "help": "For `hf-detrkd answer`: JSON file of COCO results (image_id, category_id, bbox, score) of any "
            "detector on the training images, which become answers in place of a teacher's."
        },
    )
    preset: str = field(
        default="ours",
        metadata={
            "help": "Defaults of the method's options: ours, which work on short schedules and students from nothing, "
            "or paper, those of its paper or released code, whose gradients have no limit (--max_gradient_ratio 0). "
            "Given options count in either case. Default: ours."
        },
    )
    init_from_teacher: bool = field(
        default=False,
        metadata={
            "help": "Initialise the student of --config_name (and of the control) from the teacher's matching "
            "weights. Default: false."
        },
    )
    image_size: str | None = field(
        default=None,
        metadata={"help": "Image size, a number or HEIGHTxWIDTH in pixels. Default: the image processor's."},
    )
    keep_aspect_ratio: bool = field(
        default=False,
        metadata={"help": "Fit images into the size and pad batches instead of stretching. Default: false."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better mAP. Default: train to the end."},
    )
    measure_efficiency: bool = field(
        default=True,
        metadata={"help": "Measure operations and latency of teacher and student at the end. Default: true."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print all arguments with their resolved values, and exit. Default: false."}
    )
    run_control: bool = field(
        default=False,
        metadata={
            "help": "First train the same student without a teacher, in OUTPUT_DIR/control, for comparison. "
            "Default: false."
        },
    )

    @property
    def annotations(self) -> dict[str, Path] | None:
        """The COCO JSON files by split, if they are given."""
        files = {"train": self.train_annotations_file, "val": self.eval_annotations_file}
        return {name: Path(file).expanduser() for name, file in files.items() if file is not None} or None

    def __post_init__(self) -> None:
        parse_image_size(self.image_size)
        if (self.train_annotations_file is None) != (self.eval_annotations_file is None):
            raise ValueError("Give both --train_annotations_file and --eval_annotations_file, or neither.")
        if self.labeled_fraction is not None and not 0 < self.labeled_fraction < 1:
            raise ValueError(f"--labeled_fraction must be between 0 and 1, got {self.labeled_fraction}.")
        if self.preset not in ("ours", "paper"):
            raise ValueError(f"--preset must be ours or paper, got {self.preset!r}.")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(f"--early_stopping_patience must be at least 1, got {self.early_stopping_patience}.")
        if self.check_images not in ("all", "sample", "none"):
            raise ValueError(f"--check_images must be all, sample or none, got {self.check_images!r}.")
        if self.model_name_or_path is not None and self.config_name is not None:
            raise ValueError(
                "Give the student either as --model_name_or_path (trained) or as --config_name (from scratch), got "
                f"{self.model_name_or_path!r} and {self.config_name!r}."
            )
        if self.backbone_weights is not None and self.config_name is None:
            raise ValueError(
                "--backbone_weights needs --config_name: a trained student already has a trained backbone."
            )
        if self.init_from_teacher and self.config_name is None:
            raise ValueError("--init_from_teacher needs --config_name: a trained student already has weights.")


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


def parse(argv: list[str], description: str | None = None, student: bool = True) -> Arguments:
    """Arguments from the recipe and the command line, which overrides it.

    Args:
        argv (`list[str]`): words of the command line.
        description (`str`, *optional*): for the help.
        student (`bool`): a student must be given.

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
    *("gradient_checkpointing", "auto_find_batch_size", "torch_compile", "eval_strategy", "eval_steps"),
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
