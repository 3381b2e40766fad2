r"""Checks a run without training, and reports what would go wrong.

    hf-detrkd doctor --config quickstart

    hf-detrkd doctor --model_name_or_path PekingU/rtdetr_r18vd --dataset_name path/to/folder --output_dir outputs/s \
        --teacher_model_name_or_path path/to/teacher --method kd_detr --output_file found.json

It takes the arguments of distill.py and three of its own: `--doctor_samples`, the number of images for the teacher's
checks, `--memory_limit_gb`, which overrides the memory of the device, and `--output_file` for the findings as JSON.

It checks the environment; the splits, their classes and boxes; the models, their classes, and if the method supports
them; the format of the annotated boxes, the order of the classes and the teacher's preprocessing (all three by its
predictions); memory and time of one real training step; every loss term; disk space. Each line starts with ok, warning
or problem; with a problem the exit status is 1.
"""

import json
import math
import os
import platform
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

import hf_detrkd

from ...artifacts.hub.background_push import HubPush
from ...artifacts.run_folder import check_free, check_output_folder
from ...distillation.stored_teacher import StoredTeacher
from ...evaluation.efficiency import device_name
from ...training.config import DistillationConfig
from ..arguments import Arguments, parse
from ..parser import Parser
from ..run_setup import models_of
from . import memory_of
from .check_data import load_data
from .check_pair import build_pair
from .check_precision import check_precision
from .check_step import check_disk, check_step, check_terms
from .check_teacher import check_teacher
from .findings import Report


@dataclass
class DoctorArguments:
    """The doctor's own arguments."""

    doctor_samples: int = field(
        default=32, metadata={"help": "Number of evaluation images for the teacher's checks. Default: 32."}
    )
    memory_limit_gb: float | None = field(
        default=None, metadata={"help": "Memory limit in GiB. Default: the memory of the device."}
    )
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the findings. Default: none."})

    def __post_init__(self) -> None:
        if self.doctor_samples < 1:
            raise ValueError(f"--doctor_samples must be 1 or more, got {self.doctor_samples}.")


def main(argv: list[str]) -> int:
    """Prints the findings; returns the exit status, 1 if there is a problem."""
    # The doctor runs in one process, which must not see several GPUs.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    parser = Parser(DoctorArguments, add_help=False, allow_abbrev=False)
    options, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    report = Report()
    try:
        arguments = parse(rest, __doc__, student=False, command="doctor")
    except ValueError as error:
        report.problem("arguments", str(error))
    else:
        examine(report, arguments, options)
    print(report.summary())
    if options.output_file is not None:
        file = Path(options.output_file)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"findings": report.findings, "facts": as_json(report.facts)}, indent=2) + "\n")
    return 1 if report.count("problem") else 0


def examine(report: Report, arguments: Arguments, options: DoctorArguments) -> None:
    """Runs all checks in order, and stops where later ones are impossible."""
    if arguments.config.teacher_answers == "auto":
        arguments.config.teacher_answers = None  # not made yet: the teacher itself is examined
    check_environment(report, arguments.config)
    script = arguments.script
    if script.model_name_or_path is None and script.config_name is None:  # the data set alone
        load_data(report, arguments)
        return
    if arguments.config.push_to_hub:
        check_hub(report, arguments.config)
    check_output(report, arguments)
    splits = load_data(report, arguments)
    if splits is None:
        return
    with tempfile.TemporaryDirectory() as folder:  # a trainer creates its output folder
        trainer = build_pair(report, arguments, splits, folder)
        if trainer is None:
            return
        if isinstance(trainer.distiller.teacher, StoredTeacher):
            report.ok("teacher", "Its answers are stored and fit the run; to examine it, leave out --teacher_answers.")
        elif trainer.distiller.teacher is not None:
            try:
                check_teacher(report, trainer, splits, options.doctor_samples)
            except ValueError as error:  # the teacher rejects the run's images
                report.problem("teacher", str(error))
                return
            check_precision(report, trainer.distiller.teacher.dtype, trainer.args.device)
        fits = check_step(report, trainer, options.memory_limit_gb)
        if fits and trainer.args.methods and trainer.args.distillation_weight and trainer.args.probe:
            check_terms(report, trainer)
        check_disk(report, arguments.config, trainer)


def as_json(value: Any) -> Any:
    """Facts with null for NaN and infinity, which JSON does not support."""
    if isinstance(value, dict):
        return {name: as_json(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_environment(report: Report, config: DistillationConfig) -> None:
    packages = {p.__name__: p.__version__ for p in (torch, transformers, accelerate, hf_detrkd)}
    versions = {"python": platform.python_version(), **packages}
    memory = memory_of(config.device)
    report.facts |= {"versions": versions, "device": device_name(config.device), "memory_gb": memory}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    report.ok("environment", f"{listed}; {device_name(config.device)}, {memory:.1f} GiB of memory available.")


def check_output(report: Report, arguments: Arguments) -> None:
    folder = arguments.config.output_dir
    try:
        check_output_folder(folder, models_of(arguments))
        if not arguments.script.overwrite_output_dir:
            resumes = bool(arguments.config.resume_from_checkpoint)
            check_free(folder, arguments.recipe, resumes, arguments.defaults)
    except ValueError as error:
        report.problem("output folder", str(error))
    else:
        report.ok("output folder", f"{folder} holds none of the run's models, and no other run.")


def check_hub(report: Report, config: DistillationConfig) -> None:
    push = HubPush.of(config)
    try:
        answers = push.check(make=False)
    except ValueError as error:
        report.problem("Hub", str(error))
        return
    if answers:
        report.ok("Hub", f"this run may push to {push.repo_id}.")
    else:
        report.warning("Hub", "it does not respond now: the run would continue without it, and push later.")
