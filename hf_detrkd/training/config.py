"""Arguments of a distillation run, on top of `transformers.TrainingArguments`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..artifacts.redaction import under_home
from ..data import parse_image_size
from ..distillation.schedule import DistillationSchedule
from ..methods import METHODS


@dataclass
class DistillationConfig(TrainingArguments):
    """Arguments common to all methods; a method's own options are in its `config_class`.

    Own fields come first. Besides, these defaults of [`~transformers.TrainingArguments`] differ:
    `metric_for_best_model` is `"map"`, `max_grad_norm` 0.1 (DETR), `remove_unused_columns` false (labels must reach
    the model), `logging_nan_inf_filter` false (it waits for the device in every step), `logging_steps` 50, `run_name`
    the output folder's name.

    Raises:
        ValueError: an unknown method, a method without a teacher, label smoothing, or a dtype that is none.
    """

    method: str = field(
        default="none",
        metadata={
            "help": f"Distillation method: none (plain training, the control), {', '.join(sorted(METHODS))}; or "
            "several with commas between them, which share the teacher's pass."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the teacher; needed by every method but none."}
    )
    teacher_model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the teacher on the Hub."}
    )
    class_map: str | None = field(
        default=None,
        metadata={
            "help": "YAML or JSON file of `student class: teacher class` (null for none) where the labels' names do "
            "not tell; names that differ in case and separators alone pair by themselves."
        },
    )
    teacher_image_size: str | None = field(
        default=None,
        metadata={
            "help": "What the teacher sees: a number or HEIGHTxWIDTH in pixels, made from the same augmented image. "
            "Default: the student's size."
        },
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={"help": "Precision of the teacher: float32, bfloat16 or float16. Default: bfloat16 on CUDA."},
    )
    distillation_weight: float = field(
        default=1.0, metadata={"help": "Multiplies the sum of all distillation losses."}
    )
    distillation_schedule: str = field(
        default="constant",
        metadata={"help": "How much distillation counts over the training: constant, or linear or cosine to zero."},
    )
    distillation_warmup: float = field(
        default=0.0, metadata={"help": "Fraction of the training over which distillation sets in."}
    )
    distillation_stop: float = field(
        default=1.0,
        metadata={"help": "Fraction of the training after which distillation ends, and with it the teacher's cost."},
    )
    loss_weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON object of weights that replace the method's own, by the beginning of the losses' names, "
            'for example {"kd_detr_class": 1.0, "kd_detr_box_general": 0}.'
        },
    )
    min_teacher_map: float = field(
        default=0.05,
        metadata={
            "help": "Stop before training if the teacher's mAP on the evaluation set is below; 0 leaves the check out."
        },
    )
    teacher_check_samples: int = field(
        default=500,
        metadata={"help": "Check the teacher on so many images, spread over the evaluation set; 0 for all."},
    )
    probe: bool = field(
        default=True,
        metadata={"help": "Before training, print every term's value and gradient, and stop if one teaches nothing."},
    )
    calibrate_weights: int = field(
        default=0,
        metadata={
            "help": "Choose the weights of all terms from so many steps, for example 200; a resumed run keeps them."
        },
    )
    calibration_fraction: float = field(
        default=0.3,
        metadata={"help": "Gradient norm of each calibrated term as a fraction of the task loss's, on the student."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of a moving average of the student, which is then what is evaluated, saved and pushed; for "
            "example 0.9998. Default: none."
        },
    )
    auxiliary_loss: bool = field(
        default=True, metadata={"help": "Supervise every decoder layer by the ground truth, not the last alone."}
    )
    criterion: str = field(
        default="ours",
        metadata={
            "help": "Detection loss: ours, one for all families, or transformers: the model's own, with its faults "
            "(see PAPERS.md), for comparison; auxiliary_loss is then that of the model's config."
        },
    )
    backbone_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the student's backbone. Default: as everything else."}
    )
    freeze: list[str] | None = field(
        default=None,
        metadata={
            "help": "Regular expressions: student parameters whose name matches one are frozen, all others are "
            "trained, whatever transformers froze. Example: model\\.backbone"
        },
    )
    freeze_stages: int = field(
        default=0,
        metadata={
            "help": "Freeze so many parts of the student's backbone: 1 the stem, 2 the stem and the first stage, as "
            "DETR and its line do with trained backbones."
        },
    )
    hub_timeout: float = field(
        default=600.0,
        metadata={"help": "Seconds to wait for the Hub at the end of a run; what is not there then is pushed later."},
    )
    hub_license: str | None = field(
        default=None, metadata={"help": "Licence of the student in its card, for example apache-2.0."}
    )
    metric_for_best_model: str | None = field(
        default="map", metadata={"help": "Metric that chooses the best checkpoint."}
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether that metric should be high."})
    run_name: str | None = field(
        default=None, metadata={"help": "Name of the run for trackers. Default: that of the output folder."}
    )
    max_grad_norm: float = field(default=0.1, metadata={"help": "Gradients are clipped to this norm. [DETR: 0.1]"})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must be false: labels have to reach the model."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and infinity in the logged loss; waits for the device each step."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.run_name = self.run_name or Path(self.output_dir).absolute().name
        self.loss_weights = parsed_weights(self.loss_weights)
        if isinstance(self.method, list):  # as YAML has it
            self.method = ",".join(self.method)
        if len(set(self.methods)) < len(self.methods) or not set(self.methods) <= METHODS.keys():
            raise ValueError(
                f"method must be none, or some of {', '.join(sorted(METHODS))} with commas between them, got "
                f"{self.method!r}."
            )
        if self.hub_license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.hub_license):
            raise ValueError(
                "hub_license must be a licence's name as the Hub has it, in small letters and hyphens such as "
                f"apache-2.0, mit or other, got {self.hub_license!r}."
            )
        self.schedule()
        parse_image_size(self.teacher_image_size, "teacher_image_size")
        if self.calibrate_weights < 0 or self.calibration_fraction <= 0:
            raise ValueError(
                "calibrate_weights must be at least 0 and calibration_fraction above, got "
                f"{self.calibrate_weights} and {self.calibration_fraction}."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, got {self.ema_decay}.")
        if self.ema_decay is not None and (self.deepspeed or self.fsdp):
            raise ValueError("ema_decay needs whole weights on every process: leave it out with DeepSpeed and FSDP.")
        if self.criterion not in ("ours", "transformers"):
            raise ValueError(f"criterion must be ours or transformers, got {self.criterion!r}.")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor must be 0: detection losses have no smoothed labels.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be false: labels have to reach the model.")
        if self.teacher_dtype is not None and self.teacher_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"teacher_dtype must be float32, bfloat16 or float16, got {self.teacher_dtype!r}.")

    def to_dict(self) -> dict[str, Any]:
        """As in `TrainingArguments`, for trackers: without secrets, and with `~` for the home folder."""
        return under_home(super().to_dict())

    @property
    def methods(self) -> list[str]:
        """Names of the methods; none for plain training."""
        return method_names(self.method)

    @property
    def needs_teacher(self) -> bool:
        return any(METHODS[name].needs_teacher for name in self.methods)

    def schedule(self) -> DistillationSchedule:
        """The factor of distillation over the training."""
        return DistillationSchedule(self.distillation_schedule, self.distillation_warmup, self.distillation_stop)

    def resolved_teacher_dtype(self) -> torch.dtype:
        """The teacher's precision on this device."""
        if self.teacher_dtype is not None:
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.teacher_dtype]
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def method_names(method: str) -> list[str]:
    """The names in `--method a,b`; `none` is no name."""
    return [] if method == "none" else [name.strip() for name in method.split(",")]


def parsed_weights(weights: dict[str, Any] | str | None) -> dict[str, float] | None:
    """`loss_weights` as numbers by name.

    Raises:
        ValueError: it is neither that nor JSON of it.
    """
    try:
        found = json.loads(weights) if isinstance(weights, str) else weights
        return None if found is None else {str(name): float(value) for name, value in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"loss_weights must be a JSON object of names and numbers, got {weights!r}.") from error
