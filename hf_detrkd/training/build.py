"""Builds the teacher and the distillation methods of a run from its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection, PreTrainedModel

from ..adapters import class_names
from ..distillation.class_map import read_class_map
from ..distillation.teacher import Origin, Teacher, normalization_of
from ..methods import METHODS, DistillationMethod
from ..structures.outputs import DetectorSpec
from .config import DistillationConfig


def make_teacher(
    student: PreTrainedModel,
    args: DistillationConfig,
    teacher_model: PreTrainedModel | str | None,
    processor: Any,
    teacher_processor: Any,
) -> Teacher | None:
    """The teacher of a run, or `None` if no method uses one.

    Raises:
        ValueError: a teacher that no method uses, or a method without its teacher; classes that do not match.
    """
    source = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    if not args.needs_teacher:
        if teacher_model is not None:
            asking = " or ".join(name for name, method in METHODS.items() if method.needs_teacher)
            raise ValueError(f"teacher_model is set, but no method uses it: set --method to {asking}.")
        return None
    if source is None:
        raise ValueError(f"--method {args.method} needs a teacher: set --teacher_model_name_or_path.")
    if isinstance(source, str):
        revision = args.teacher_model_revision
        model = AutoModelForObjectDetection.from_pretrained(source, revision=revision, dtype=torch.float32)
        teacher_processor = teacher_processor or AutoImageProcessor.from_pretrained(source, revision=revision)
        origin = Origin.of(source, model.config.model_type, revision)
    else:
        model, origin = source, None
    normalizations = {}
    if processor is not None:
        normalizations["student_normalization"] = normalization_of(processor)
        normalizations["normalization"] = normalization_of(teacher_processor or processor)
    class_map = None if args.class_map is None else read_class_map(args.class_map)
    names = class_names(student.config)
    return Teacher(model, names, args.resolved_teacher_dtype(), class_map=class_map, origin=origin, **normalizations)


def make_methods(
    names: Sequence[str], configs: Any, student: DetectorSpec, teacher: DetectorSpec | None
) -> list[DistillationMethod]:
    """The methods of a run, each with its given config or its defaults.

    Args:
        names (`Sequence[str]`): keys of `METHODS`.
        configs: `None`, a method's config, or a list of them.
        student, teacher ([`DetectorSpec`])

    Raises:
        ValueError: a config that belongs to none of the methods; a pair of models that a method does not support.
    """
    given = [] if configs is None else list(configs) if isinstance(configs, list | tuple) else [configs]
    classes = {METHODS[name].config_class: METHODS[name] for name in names}
    for config in given:
        if type(config) not in classes:
            wanted = ", ".join(c.__name__ for c in classes) or "none, since there is no method"
            raise ValueError(f"method_config is a {type(config).__name__}, but this run takes {wanted}.")
    chosen = {type(config): config for config in given}
    # Without a teacher there are only methods that need none.
    return [method(chosen.get(kind) or kind(), student, cast(Any, teacher)) for kind, method in classes.items()]
