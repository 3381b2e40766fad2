"""Checks and prepares the student that a trainer is given, by name or as an object."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from ..distillation.freezing import apply_freezing, freeze_stages
from ..models.loading import load_detector
from .config import DistillationConfig


def prepared_student(model: Any, args: DistillationConfig, teacher: Any = None) -> PreTrainedModel:
    """The student of a run. It trains as a whole, also what transformers freezes by itself; but what the owner of an
    object froze stays frozen, unless `args.freeze` says otherwise.

    Args:
        model: the student, or its Hub id or folder.
        args ([`DistillationConfig`])
        teacher (*optional*): the teacher, as given to the trainer.

    Raises:
        ValueError: the student is the teacher, is no detector of transformers, or has weights of 16 bits.
    """
    if isinstance(model, str):
        model = load_detector(model, trust_remote_code=args.trust_remote_code)
    if type(model).__module__.split(".")[0] == "peft":
        raise ValueError(
            "Adapters of PEFT (LoRA) are not supported: merge them with merge_and_unload() and train the whole "
            "student, or freeze parts of it with --freeze."
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"The student must be a detector of transformers, or its name, got a {type(model).__name__}.")
    if model is teacher:
        raise ValueError(
            "The student and the teacher are the same object, whose weights would teach themselves: give the teacher "
            "as a copy, copy.deepcopy(model)."
        )
    check_precision(model)
    if args.freeze is not None or not frozen_by_owner(model):
        apply_freezing(model, args.freeze)
    freeze_stages(model, args.freeze_stages or 0)
    return model


def frozen_by_owner(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that are frozen now, and not when transformers makes such a model."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if not frozen:
        return frozen
    with torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config))
    return frozen - {name for name, parameter in made.named_parameters() if not parameter.requires_grad}


def checked_args(args: Any) -> DistillationConfig:
    """The arguments of a trainer.

    Raises:
        ValueError: the arguments are not those of this trainer, or torch's DataParallel would be used.
    """
    if not isinstance(args, DistillationConfig):
        raise ValueError(
            f"DistillationTrainer takes its arguments as a DistillationConfig, got {type(args).__name__}: it has all "
            "fields of TrainingArguments."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"DistillationTrainer does not support DataParallel ({args.n_gpu} GPUs visible): run with "
            "`accelerate launch`."
        )
    return args


def initialized(model_init: Any, trial: Any = None) -> Any:
    """The student of a `model_init`, which may take the trial of a hyperparameter search."""
    return model_init(trial) if inspect.signature(model_init).parameters else model_init()


def check_precision(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: weights are stored in 16 bits, in which an optimizer cannot add small steps.
    """
    low = next((p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if low is not None:
        raise ValueError(
            f"The student's weights are {str(low).removeprefix('torch.')}, in which small steps are lost: load it "
            "with dtype=torch.float32. Mixed precision is --bf16 or --fp16."
        )
