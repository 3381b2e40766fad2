"""Arguments of a distillation run, on top of `transformers.TrainingArguments`."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..answers import STORED
from ..artifacts.redaction import under_home
from ..artifacts.trackers import check_installed
from ..data.checks import is_finite
from ..data.image_size import plain_image_size
from ..data.text import there
from ..distillation.schedule import DistillationSchedule
from ..methods import METHODS


DEFAULT_VIEWS = 4  # of each image, with stored answers
AUTO_STEPS = 40  # of --calibrate_weights auto
DECAYING = ", ".join(f"{m.schedule} for {name}" for name, m in METHODS.items() if m.schedule != "constant")


@dataclass
class DistillationConfig(TrainingArguments):
    """Arguments common to all methods; a method's own options are in its `config_class`.

    It also changes these defaults of [`~transformers.TrainingArguments`]: `metric_for_best_model` is `"map"`,
    `max_grad_norm` 0.1 (DETR), `remove_unused_columns` false (labels must reach the model), `logging_nan_inf_filter`
    false (it waits for the device in every step), `logging_steps` 50, `run_name` the output folder's name.

    Raises:
        ValueError: an invalid value, such as an unknown method or dtype, or label smoothing.
        ImportError: `report_to` names a tracker that is not installed.
    """

    method: str = field(
        default="none",
        metadata={
            "help": f"Distillation method: none (plain training, the control), {', '.join(sorted(METHODS))}; or "
            "a comma-separated list of them, which share one teacher pass. Default: none."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of the teacher; A,B for several, with --teacher_answers auto. Required by every "
            "method that uses one."
        },
    )
    teacher_model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the teacher on the Hub. Default: main."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the own modelling code of student and teacher from the Hub. Default: false."},
    )
    class_map: str | None = field(
        default=None,
        metadata={
            "help": "YAML or JSON file of `student class: teacher class` lines (null for none), for classes whose "
            "names differ; of several teachers one file each, A,B. Default: classes are matched by name, ignoring "
            "case and separators."
        },
    )
    teacher_image_size: str | None = field(
        default=None,
        metadata={
            "help": "Size of the teacher's images, a number or HEIGHTxWIDTH in pixels, made from the same augmented "
            "image. Default: the student's size."
        },
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the teacher: float32, bfloat16 or float16. Default: bfloat16 on CUDA, else float32."
        },
    )
    teacher_compile: bool | None = field(
        default=None, metadata={"help": "Compile the teacher, too. Default: as --torch_compile for the student."}
    )
    teacher_answers: str | None = field(
        default=None,
        metadata={
            "help": "Folder or data set repository (id or id@revision) of stored answers of the teacher, made by "
            "`hf-detrkd answer`, which take its place in training; auto: made first, in the output folder; A,B: "
            "several teachers, each for the classes that it knows. Default: none, the teacher runs in every step."
        },
    )
    teacher_merge: str = field(
        default="mean",
        metadata={
            "help": "Where several teachers know a class: mean, all of them teach it; best, the one with the highest "
            "AP of the class on the evaluation set. Default: mean."
        },
    )
    augmentation_views: int | None = field(
        default=None,
        metadata={
            "help": "Number of augmented views of each training image, which come back in turn, one an epoch; stored "
            "answers need it. Default: a new view every epoch; 4 with --teacher_answers."
        },
    )
    augmentation_seed: int = field(
        default=0,
        metadata={
            "help": "Seed of the augmented views, so that runs of several seeds share stored answers. Default: 0."
        },
    )
    answers_form: str = field(
        default="views",
        metadata={
            "help": "Form of stored answers. views: the teacher sees every augmented view; moved: it sees each image "
            "as it is, and its boxes move with the augmentation, for KD-DETR's specific points. Default: views."
        },
    )
    hub_answers_id: str | None = field(
        default=None,
        metadata={
            "help": "For `hf-detrkd answer`: data set repository that the answers are pushed to, private unless "
            "--hub_private_repo false. Default: not pushed."
        },
    )
    answers_dtype: str = field(
        default="float16",
        metadata={"help": "Precision of stored answers: float16 or float32; places are float32. Default: float16."},
    )
    unlabeled_fraction: float = field(
        default=0.5,
        metadata={
            "help": "Share of unlabelled images in each batch, with --unlabeled_dataset_name or --labeled_fraction. "
            "Default: 0.5."
        },
    )
    pseudo_threshold: float = field(
        default=0.5,
        metadata={
            "help": "Lowest score of the teacher's detections that take the place of ground truth in unlabelled "
            "images, for the terms that need it. Default: 0.5."
        },
    )
    pseudo_labels: bool = field(
        default=False,
        metadata={
            "help": "Train the detection loss on these detections, too. Default: false, only the distillation losses "
            "see unlabelled images."
        },
    )
    distillation_weight: float = field(
        default=1.0, metadata={"help": "Factor of the sum of all distillation losses. Default: 1."}
    )
    distillation_schedule: str | None = field(
        default=None,
        metadata={
            "help": "Schedule of the distillation weight: constant, or linear or cosine decay to zero. Default: each "
            f"method's own, {DECAYING}; constant for the others."
        },
    )
    distillation_warmup: float = field(
        default=0.0,
        metadata={"help": "Fraction of the training over which the distillation weight rises from zero. Default: 0."},
    )
    distillation_stop: float = field(
        default=1.0,
        metadata={
            "help": "Fraction of the training after which distillation stops and the teacher is not run. Default: 1."
        },
    )
    loss_weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON object of loss weights that override the method's own, by the start of the loss names, "
            'for example {"kd_detr_class": 1.0, "kd_detr_box_general": 0}.'
        },
    )
    min_teacher_map: float = field(
        default=0.05,
        metadata={
            "help": "Lowest mAP of the teacher on the evaluation set, in [0, 1]; with less the run stops before "
            "training. 0 disables the check. Default: 0.05."
        },
    )
    teacher_check_samples: int = field(
        default=500,
        metadata={
            "help": "Number of evaluation images used to check the teacher, evenly spread; 0 for all. Default: 500."
        },
    )
    max_detections: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of detections per image and of all classes in the evaluation of student and "
            "teacher. Default: that of the authors of each model, such as 300 for DINO and 100 for Deformable DETR."
        },
    )
    probe: bool = field(
        default=True,
        metadata={
            "help": "Before training, print the value and gradient norm of every loss term, and stop if one is "
            "not finite, does not reach the student or is too strong. Default: true."
        },
    )
    max_gradient_ratio: float = field(
        default=10.0,
        metadata={
            "help": "Largest gradient norm of a loss term on the student, relative to the task loss, that the probe "
            "accepts; 0 for no limit, as with --preset paper. Default: 10."
        },
    )
    calibrate_weights: str = field(
        default="0",
        metadata={
            "help": f"Number of warm-up steps used to calibrate the loss weights, or auto for {AUTO_STEPS}; a resumed "
            "run keeps its weights. Default: 0, no calibration."
        },
    )
    calibration_fraction: float = field(
        default=0.3,
        metadata={
            "help": "Gradient norm of each calibrated term on the student, relative to the task loss. Default: 0.3."
        },
    )
    gradient_ratio_steps: int = field(
        default=500,
        metadata={
            "help": "Number of steps between measurements of each term's gradient norm on the student, relative to "
            "the task loss, on two images of a batch (those with most boxes, one of them labelled), which are logged "
            "as <term>_gradient. 0 disables them. Default: 500."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of an exponential moving average (EMA) of the student, for example 0.9998; when set, the "
            "EMA weights are evaluated, saved and pushed. Default: no EMA."
        },
    )
    class_loss_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the classification loss of the student's own queries and of extra ones. Default: that "
            "of the student's config; for Deformable DETR, whose config has none, 1 as in transformers (2 in the "
            "original recipe)."
        },
    )
    auxiliary_loss: bool = field(
        default=True,
        metadata={"help": "Supervise every decoder layer with the ground truth, not only the last. Default: true."},
    )
    criterion: str = field(
        default="ours",
        metadata={
            "help": "Detection loss: ours (one for all families) or, for comparison, transformers (the model's own, "
            "with its faults, see PAPERS.md, and with auxiliary_loss as in the model's config). Default: ours."
        },
    )
    backbone_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the student's backbone. Default: --learning_rate."}
    )
    learning_rate_factors: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON object of regular expressions and factors: student parameters whose name matches one learn "
            "at --learning_rate times its factor. Deformable DETR: "
            '{"sampling_offsets|reference_points": 0.1}. Default: none.'
        },
    )
    freeze: list[str] | None = field(
        default=None,
        metadata={
            "help": "Regular expressions: student parameters whose name matches one are frozen, all others are "
            "trained, even those that transformers froze. Example: model\\.backbone"
        },
    )
    freeze_stages: int | None = field(
        default=None,
        metadata={
            "help": "Number of backbone stages of the student to freeze: 1 = stem, 2 = stem and first stage. Default: "
            "0; with --backbone_weights 2 for DETR, Conditional, Deformable and DAB-DETR, DINO and Faster R-CNN, as "
            "in their authors' code."
        },
    )
    hub_timeout: float = field(
        default=600.0,
        metadata={"help": "Seconds to wait for pending uploads at the end of a run before giving up. Default: 600."},
    )
    hub_license: str | None = field(
        default=None,
        metadata={"help": "License in the student's card, such as apache-2.0. Default: that of its source model."},
    )
    metric_for_best_model: str | None = field(
        default="map",
        metadata={"help": "Metric that selects the best checkpoint: the highest, or the lowest loss. Default: map."},
    )
    run_name: str | None = field(
        default=None, metadata={"help": "Name of the run in trackers. Default: the output folder's name."}
    )
    max_grad_norm: float = field(
        default=0.1, metadata={"help": "Gradients are clipped to this norm. Default: 0.1, as in DETR."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must be false: labels have to reach the model."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Hide NaN and infinity in the logged loss; waits for the device each step. Default: false."},
    )
    logging_steps: float = field(default=50, metadata={"help": "Number of steps between logs. Default: 50."})

    def __post_init__(self) -> None:
        check_kinds(self)
        super().__post_init__()
        check_installed(self.report_to)
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch warns of it in every evaluation
        self.run_name = self.run_name or Path(self.output_dir).absolute().name
        self.loss_weights = parsed_numbers(self.loss_weights, "loss_weights")
        self.learning_rate_factors = parsed_numbers(self.learning_rate_factors, "learning_rate_factors")
        if isinstance(self.method, list):  # a YAML list
            self.method = ",".join(self.method)
        if len(set(self.methods)) < len(self.methods) or not set(self.methods) <= METHODS.keys():
            raise ValueError(
                f"method must be none or a comma-separated list of {', '.join(sorted(METHODS))}, got {self.method!r}."
            )
        if self.hub_license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.hub_license):
            raise ValueError(
                "hub_license must be a license id of the Hub, in lower case with hyphens, such as apache-2.0, mit or "
                f"other, got {self.hub_license!r}."
            )
        if self.answers_dtype not in STORED:
            raise ValueError(f"answers_dtype must be float16 or float32, got {self.answers_dtype!r}.")
        if self.augmentation_views is not None and self.augmentation_views < 1:
            raise ValueError(f"augmentation_views must be at least 1, got {self.augmentation_views}.")
        if self.teacher_merge not in ("mean", "best"):
            raise ValueError(f"teacher_merge must be mean or best, got {self.teacher_merge!r}.")
        if self.answers_form not in ("views", "moved"):
            raise ValueError(f"answers_form must be views or moved, got {self.answers_form!r}.")
        if not 0 < self.unlabeled_fraction < 1 or not 0 < self.pseudo_threshold < 1:
            raise ValueError(
                "unlabeled_fraction and pseudo_threshold must be between 0 and 1, got "
                f"{self.unlabeled_fraction} and {self.pseudo_threshold}."
            )
        if not self.needs_teacher:
            self.teacher_answers = None
        views = self.teacher_answers is not None and self.answers_form == "views"
        if views and self.augmentation_views is None:
            self.augmentation_views = DEFAULT_VIEWS
        self.schedules()
        self.teacher_image_size = plain_image_size(self.teacher_image_size, "teacher_image_size")
        if str(self.calibrate_weights) != "auto" and not str(self.calibrate_weights).isdigit():
            raise ValueError(
                f"calibrate_weights must be auto or a number of steps, at least 0, got {self.calibrate_weights!r}."
            )
        if self.calibration_fraction <= 0 or self.gradient_ratio_steps < 0 or self.max_gradient_ratio < 0:
            raise ValueError(
                "calibration_fraction must be greater than 0, gradient_ratio_steps and max_gradient_ratio at least 0, "
                f"got {self.calibration_fraction}, {self.gradient_ratio_steps} and {self.max_gradient_ratio}."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, got {self.ema_decay}.")
        if self.max_detections is not None and self.max_detections < 1:
            raise ValueError(f"max_detections must be at least 1, got {self.max_detections}.")
        if self.class_loss_weight is not None and self.class_loss_weight <= 0:
            raise ValueError(f"class_loss_weight must be above 0, got {self.class_loss_weight}.")
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError(
                "bf16_full_eval and fp16_full_eval round the student's weights and boxes: set bf16 or fp16, which "
                "evaluate in mixed precision."
            )
        if self.criterion not in ("ours", "transformers"):
            raise ValueError(f"criterion must be ours or transformers, got {self.criterion!r}.")
        batches = self.per_device_train_batch_size, self.per_device_eval_batch_size
        if not all(type(one) is int and one >= 1 for one in batches):
            raise ValueError("per_device_train_batch_size and per_device_eval_batch_size must be at least 1.")
        if getattr(self, "enable_jit_checkpoint", False):
            raise ValueError("enable_jit_checkpoint is not needed: SIGTERM always saves at the next step.")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor must be 0: detection losses do not support label smoothing.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be false: labels have to reach the model.")
        if self.teacher_dtype is not None and self.teacher_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"teacher_dtype must be float32, bfloat16 or float16, got {self.teacher_dtype!r}.")

    def to_dict(self) -> dict[str, Any]:
        """As in `TrainingArguments`, for trackers: without secrets, and with `~` for the home folder."""
        return under_home(super().to_dict())

    @property
    def methods(self) -> list[str]:
        """Names of the methods; empty for plain training."""
        return method_names(self.method)

    @property
    def needs_teacher(self) -> bool:
        return any(METHODS[name].needs_teacher for name in self.methods)

    def schedules(self) -> dict[str, DistillationSchedule]:
        """The schedule of each method's weight."""
        warmup, stop = self.distillation_warmup, self.distillation_stop
        shapes = {name: self.distillation_schedule or METHODS[name].schedule for name in self.methods}
        return {name: DistillationSchedule(shape, warmup, stop) for name, shape in shapes.items()}

    @property
    def calibration_steps(self) -> int:
        """Number of steps of `calibrate_weights`."""
        return AUTO_STEPS if self.calibrate_weights == "auto" else int(self.calibrate_weights)

    def resolved_teacher_dtype(self) -> torch.dtype:
        """The teacher's precision on this device."""
        if self.teacher_dtype is not None:
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.teacher_dtype]
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


NUMBERS_TOO = ("calibrate_weights", "teacher_image_size")  # texts of a command line that may be given as numbers
KINDS = {"float": "a number", "int": "a whole number", "str": "text", "bool": "true or false"}


def check_kinds(config: Any) -> None:
    """Checks the plain fields that [`DistillationConfig`] adds to `TrainingArguments`, or whose default it changes.

    Raises:
        ValueError: a field holds another kind of value.
    """
    for name, kind in DistillationConfig.__annotations__.items():
        word, _, more = str(kind).partition(" | ")
        value = getattr(config, name, None)
        if word not in KINDS or (value is None and more == "None"):
            continue
        fits = {
            "float": is_finite(value),
            "int": type(value) is int,
            "str": isinstance(value, str)
            or (name == "method" and _are_texts(value))
            or (name in NUMBERS_TOO and type(value) is int),
            "bool": isinstance(value, bool),
        }[word]
        if not fits and more in ("", "None"):
            raise ValueError(f"{name} must be {KINDS[word]}, got {value!r:.80}.")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def method_names(method: str) -> list[str]:
    """The method names in `--method a,b`; empty for `none`."""
    return [] if method == "none" else listed(method)


def listed(names: str | None) -> list[str]:
    """The names in `a,b`; empty for `None`. A file or folder whose name has a comma is one."""
    if names is None:
        return []
    return [names] if there(names) else [name.strip() for name in names.split(",")]


def parsed_numbers(given: dict[str, Any] | str | None, argument: str) -> dict[str, float] | None:
    """A dict of numbers by name, from one or from its JSON.

    Raises:
        ValueError: it is neither such a dict nor its JSON.
    """
    try:
        found = json.loads(given) if isinstance(given, str) else given
        numbers = None if found is None else {str(name): float(value) for name, value in found.items()}
        if all(map(math.isfinite, (numbers or {}).values())):
            return numbers
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        pass
    raise ValueError(f"{argument} must be a JSON object of names and finite numbers, got {given!r:.200}.")
