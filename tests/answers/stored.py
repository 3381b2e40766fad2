"""A tiny teacher's answers to generated images: what the tests share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_detrkd.adapters import adapter_for
from hf_detrkd.answers import AnswerWriter, StoredAnswers
from hf_detrkd.data import (
    AugmentationConfig,
    DetectionCollator,
    DetectionDataset,
    DetectionTransform,
    load_detection_splits,
)
from hf_detrkd.data.shapes import SHAPE_CLASSES
from hf_detrkd.distillation.answering import Answering, answer_shards
from hf_detrkd.distillation.teacher import Teacher
from hf_detrkd.methods import METHODS, DistillationMethod
from tests import tiny


IMAGES, VIEWS, SEED = 5, 3, 11
COLLATE = DetectionCollator()
NAMES = {"name": "shapes", "split": "train", "teacher_image_size": None}
CPU = torch.device("cpu")
CLASSES = tuple(SHAPE_CLASSES)


def dataset(images: int = IMAGES, views: int | None = VIEWS, **changes: Any) -> DetectionDataset:
    """Generated images with zoom, flips and colours, in views that come back."""
    splits = load_detection_splits("shapes", max_train_samples=images, max_eval_samples=1, shapes_size=(64, 64))
    augmentation = AugmentationConfig(**{"iou_crop": 0.0, "scale_jitter": 1.0, "max_scale": 1.2} | changes)
    return splits.train.with_transform(DetectionTransform((96, 96), augmentation=augmentation), SEED, views)


def build(family: str, classes: Sequence[str] = CLASSES, **options: Any) -> PreTrainedModel:
    """A tiny detector of generated shapes."""
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    return tiny.build(family, **names, **options)


def teacher_of(family: str, classes: Sequence[str] = CLASSES) -> Teacher:
    return Teacher(build(family, seed=1), classes)


def methods_of(student: Any, teacher: Teacher, **options: dict[str, Any]) -> list[DistillationMethod]:
    specs = adapter_for(student).spec, teacher.spec
    torch.manual_seed(3)
    return [METHODS[name](METHODS[name].config_class(**given), *specs) for name, given in options.items()]


def stored(
    folder: Path,
    teacher: Teacher,
    methods: list[DistillationMethod],
    data: DetectionDataset,
    precision: str = "float32",
    shard: int = 4,
    numbers: Any = None,
) -> StoredAnswers:
    """The answers of a teacher, written and opened."""
    answering = Answering(teacher, methods, SEED, padded=False)
    manifest = answering.manifest(data, COLLATE([data.view_of(0, 0)]), NAMES, precision, shard)
    writer = AnswerWriter(folder, manifest)
    writer.begin()
    for _ in answer_shards(answering, data, writer, numbers or writer.missing(), 2, COLLATE, CPU):
        pass
    return StoredAnswers(folder)
