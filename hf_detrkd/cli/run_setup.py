"""Builds the data sets, models and trainer of a run from its arguments."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeAlias, cast

from transformers import EarlyStoppingCallback, PreTrainedModel, set_seed

from .. import DistillationConfig, DistillationTrainer
from ..data import (
    AugmentationConfig,
    DetectionDataset,
    DetectionSplits,
    DetectionStream,
    DetectionTransform,
    StreamedSplits,
    load_detection_splits,
    load_streamed_splits,
    parse_image_size,
)
from ..data.faults import CheckImages, check_boxes, check_images
from ..data.images import allow_pixels
from ..distillation.freezing import usual_stages
from ..distillation.initialization import init_from_teacher
from ..distillation.student import build_student, load_backbone_weights, load_image_processor, load_student
from ..models.loading import load_detector
from .arguments import NO_DATA, Arguments, ScriptArguments


RunSplits: TypeAlias = DetectionSplits | StreamedSplits


def make_student(
    script: ScriptArguments, classes: list[str], config: DistillationConfig
) -> tuple[PreTrainedModel, Any]:
    """Student and image processor; the same seed gives the same weights."""
    set_seed(config.seed)
    if script.config_name is not None:
        trained = script.backbone_weights is not None
        model = build_student(script.config_name, classes, trained_backbone=trained)
        if script.init_from_teacher:
            copied = inherit(model, config)
            if config.process_index == 0:
                print(copied)
        if script.backbone_weights is not None:
            load_backbone_weights(model, script.backbone_weights)
            if config.freeze_stages is None:
                config.freeze_stages = usual_stages(model)
    else:
        name, trust = str(script.model_name_or_path), config.trust_remote_code
        model = load_student(name, classes, script.model_revision, trust)
    size = parse_image_size(script.image_size)
    ratio, revision = script.keep_aspect_ratio, script.model_revision
    processor = load_image_processor(model, script.model_name_or_path, size, ratio, revision)
    return model, processor


def inherit(student: PreTrainedModel, config: DistillationConfig) -> str:
    """Initialises a student from the run's teacher; returns a summary of the copied and other weights."""
    name, revision = config.teacher_model_name_or_path, config.teacher_model_revision
    if name is None:
        raise ValueError("--init_from_teacher needs --teacher_model_name_or_path.")
    teacher = load_detector(name, revision=revision, trust_remote_code=config.trust_remote_code)
    return init_from_teacher(student, teacher).summary()


def with_transforms(
    splits: RunSplits, processor: Any, augmentation: AugmentationConfig, config: DistillationConfig
) -> tuple[DetectionDataset | DetectionStream, DetectionDataset]:
    """Training and evaluation set with the preprocessing for student and teacher. Images without labels are only for
    runs with a teacher."""
    live = config.needs_teacher and config.teacher_answers is None
    seen = parse_image_size(config.teacher_image_size) if live else None
    transforms = (
        DetectionTransform.for_processor(processor, kind, teacher_size=seen, normalize=False)
        for kind in (augmentation, None)
    )
    views = config.augmentation_views
    seed = config.seed if views is None else config.augmentation_seed
    train = splits.all_train if config.needs_teacher else splits.train
    return train.with_transform(next(transforms), seed, views), splits.eval.with_transform(next(transforms))


def load_run_splits(arguments: Arguments) -> RunSplits:
    """As [`load_splits`]; with `--streaming` the training split is a stream."""
    script = arguments.script
    if not script.streaming:
        return load_splits(arguments)
    name = data_named(script)
    with arguments.config.main_process_first(desc="reading the data set"):
        return load_streamed_splits(
            name,
            **chosen_splits(script),
            class_names=script.class_names,
            shuffle_buffer_size=script.shuffle_buffer_size,
        )


def chosen_splits(script: ScriptArguments) -> dict[str, Any]:
    """What is loaded of a data set, streamed or not."""
    return {
        "train_split": script.dataset_train_split,
        "eval_split": script.dataset_eval_split,
        "max_train_samples": script.max_train_samples,
        "max_eval_samples": script.max_eval_samples,
        "skip_unreadable_images": script.skip_unreadable_images,
        "config_name": script.dataset_config_name,
    }


def data_named(script: ScriptArguments) -> str:
    """The name of the data set; also sets the limit of pixels.

    Raises:
        ValueError: there is none.
    """
    if script.dataset_name is None:
        raise ValueError(NO_DATA)
    if script.max_image_pixels is not None:
        allow_pixels(script.max_image_pixels)
    return script.dataset_name


def load_splits(arguments: Arguments) -> DetectionSplits:
    """The run's data set, loaded by the main process first.

    Raises:
        ValueError: no data set is named, or it cannot be used; `--streaming`.
    """
    script = arguments.script
    name = data_named(script)
    if script.streaming:
        raise ValueError("Only hf-detrkd distill reads a stream: leave out --streaming.")
    with arguments.config.main_process_first(desc="reading the data set"):
        return load_detection_splits(
            name,
            **chosen_splits(script),
            unlabeled_name=script.unlabeled_dataset_name,
            labeled_fraction=script.labeled_fraction,
            annotations=script.annotations,
        )


def check_data(arguments: Arguments, splits: RunSplits) -> None:
    """Checks the boxes, and reads the images that `--check_images` says, on the first process; of a stream the first
    rows.

    Raises:
        `DatasetError`: there is nothing to train on, the boxes seem to have another format, or images cannot be used.
    """
    if isinstance(splits, StreamedSplits):
        train = labeled = splits.train.head()
    else:
        train, labeled = splits.all_train, splits.train
    check_boxes(labeled, splits.eval)
    mode = cast(CheckImages, arguments.script.check_images)
    with arguments.config.main_process_first(desc="checking the images"):
        if arguments.config.local_process_index == 0:
            check_images(train, "training images", mode)
            check_images(splits.eval, "evaluation images", mode)


def build_trainer(
    arguments: Arguments, splits: RunSplits | None = None, config: DistillationConfig | None = None
) -> DistillationTrainer:
    """The trainer of a run.

    Args:
        arguments ([`Arguments`])
        splits (*optional*): the data set, if it is already loaded.
        config (*optional*): overrides that of the arguments, for the control.
    """
    config, splits = config or arguments.config, splits or load_splits(arguments)
    model, processor = make_student(arguments.script, splits.train.classes, config)
    train_set, eval_set = with_transforms(splits, processor, arguments.augmentation, config)
    patience = arguments.script.early_stopping_patience
    return DistillationTrainer(
        model=model,
        args=config,
        method_config=arguments.methods if config.methods else None,
        processing_class=processor,
        train_dataset=train_set,
        eval_dataset=eval_set,
        callbacks=None if patience is None else [EarlyStoppingCallback(patience)],
    )


def control_of(config: DistillationConfig) -> DistillationConfig:
    """The config of the same run without a teacher, in its own folder; without stored answers it gets a new view of
    each image in every epoch."""
    folder = str(Path(config.output_dir) / "control")
    resume = config.resume_from_checkpoint in ("true", "True", True)  # a given checkpoint is from the other run
    return dataclasses.replace(
        cast(Any, config),
        method="none",
        loss_weights=None,
        teacher_answers=None,
        augmentation_views=None if config.teacher_answers is not None else config.augmentation_views,
        output_dir=folder,
        run_name=f"{config.run_name}-control",
        resume_from_checkpoint=resume or None,
        push_to_hub=False,
    )


def models_of(arguments: Arguments) -> dict[str, str | None]:
    """Hub ids and folders that a run loads, by role."""
    script = arguments.script
    named = {"student": script.model_name_or_path, "student's config": script.config_name}
    return named | {"teacher": arguments.config.teacher_model_name_or_path}
