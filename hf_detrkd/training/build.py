"""Builds the teacher, the detection loss and the distillation methods of a run from its arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from ..adapters import ADAPTERS, DetectorAdapter, class_names, spec_for
from ..answers import StoredAnswers
from ..data.processor import normalization_of
from ..distillation.class_map import read_class_map
from ..distillation.distiller import Distiller
from ..distillation.merged_teacher import MergedTeacher
from ..distillation.stored_teacher import StoredTeacher
from ..distillation.teacher import Origin, Teacher
from ..losses.criterion import DetectionCriterion, ModelCriterion
from ..methods import METHODS, DistillationMethod
from ..models.loading import load_detector, load_processor
from ..structures.outputs import DetectorSpec
from .config import DistillationConfig, listed


def make_teacher(
    student: PreTrainedModel,
    args: DistillationConfig,
    teacher_model: PreTrainedModel | str | None,
    processor: Any,
    teacher_processor: Any,
) -> Teacher | StoredTeacher | None:
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
    names = class_names(student.config)
    if args.teacher_answers is not None:
        if teacher_model is not None:
            raise ValueError(
                "Set teacher_model or teacher_answers, not both: stored answers take the teacher's place."
            )
        with args.main_process_first(desc="opening the answers"):
            return stored_teacher(args, names)
    if source is None:
        raise ValueError(
            f"--method {args.method} needs a teacher: set --teacher_model_name_or_path, or --teacher_answers."
        )
    if isinstance(source, str):
        if len(listed(source)) > 1:
            raise ValueError(f"Several teachers ({source}) teach by stored answers: set --teacher_answers auto.")
        revision = args.teacher_model_revision
        own: dict[str, Any] = {"revision": revision, "trust_remote_code": args.trust_remote_code}
        model = load_detector(source, **own)
        teacher_processor = teacher_processor or load_processor(source, **own)
        origin = Origin.of(source, model.config.model_type, revision)
    else:
        model, origin = source, None
    class_map = None if args.class_map is None else read_class_map(args.class_map)
    normalizations = {}
    if processor is not None:
        normalizations["student_normalization"] = normalization_of(processor)
        normalizations["normalization"] = normalization_of(teacher_processor or processor)
    return Teacher(model, names, args.resolved_teacher_dtype(), class_map=class_map, origin=origin, **normalizations)


def stored_teacher(args: DistillationConfig, names: Sequence[str]) -> StoredTeacher:
    """The teacher of a run with stored answers, or several in the role of one.

    Raises:
        ValueError: `teacher_answers` is `auto`; answers that cannot be opened; not one class map for each of several.
    """
    sources, files = listed(args.teacher_answers), listed(args.class_map)
    if sources == ["auto"]:
        raise ValueError("teacher_answers auto is for the command line: make the answers with `hf-detrkd answer`.")
    maps: list[Any] = [read_class_map(file) for file in files] or [None] * len(sources)
    if len(maps) != len(sources):
        raise ValueError(f"class_map must name one file for each of {len(sources)} teacher_answers, got {len(maps)}.")
    members = [
        StoredTeacher(StoredAnswers(source, args.hub_token), names, class_map)
        for source, class_map in zip(sources, maps, strict=True)
    ]
    return members[0] if len(members) == 1 else MergedTeacher(members, cast(Any, args.teacher_merge))


def make_distiller(
    student: PreTrainedModel, teacher: Teacher | StoredTeacher | None, args: DistillationConfig, method_config: Any
) -> Distiller:
    """Student, teacher and methods of a run; the same seed gives the methods' projections the same weights.

    Raises:
        ValueError: see [`make_criterion`], [`make_methods`] and [`Distiller`].
    """
    set_seed(args.seed)
    criterion, spec = make_criterion(student.config, args)
    methods = make_methods(args.methods, method_config, spec, None if teacher is None else teacher.spec)
    weights = cast(dict[str, float] | None, args.loss_weights)
    distiller = Distiller(student, teacher, methods, weights, args.seed)
    distiller.adapter.criterion = criterion
    return distiller


def make_criterion(
    config: PreTrainedConfig, args: DistillationConfig
) -> tuple[DetectionCriterion | ModelCriterion, DetectorSpec]:
    """The detection loss of a student's own queries, and the student's properties, with the same loss for extra ones.

    Raises:
        ValueError: `class_loss_weight` for a model that computes its loss itself.
    """
    spec, criterion = spec_for(config), ADAPTERS[config.model_type].criterion_of(config)
    if args.class_loss_weight is not None:
        if not isinstance(criterion, DetectionCriterion) or args.criterion == "transformers":
            raise ValueError(
                f"class_loss_weight is for losses of this package, but {spec.family} computes its own here: leave it "
                "out."
            )
        criterion = replace(criterion, class_weight=args.class_loss_weight)
        spec = replace(spec, supervision=criterion)
    if args.criterion == "transformers":
        return ModelCriterion(), spec
    return criterion.with_auxiliary(args.auxiliary_loss), spec


def learning_rates(adapter: DetectorAdapter, args: DistillationConfig) -> dict[int, float]:
    """Learning rates of the student's parameters that have their own, by `id`: the backbone's, and those of
    `learning_rate_factors`, of which the first that matches counts.

    Raises:
        ValueError: an expression matches no parameter.
    """
    rates: dict[int, float] = {}
    factors = cast(dict[str, float], args.learning_rate_factors or {})
    for pattern, factor in reversed(factors.items()):
        found = [p for name, p in adapter.model.named_parameters() if re.search(pattern, name)]
        if not found:
            raise ValueError(
                "learning_rate_factors must be expressions that match names of the student's parameters, but none has "
                f"{pattern!r}."
            )
        rates |= {id(parameter): factor * args.learning_rate for parameter in found}
    if args.backbone_learning_rate is not None:
        rates |= {id(p): args.backbone_learning_rate for _, p in adapter.backbone_parameters() if id(p) not in rates}
    return rates


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
