"""The training set of a run: with stored answers, and with images that nobody labelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Sampler

from ..data import DetectionDataset
from ..data.share_sampler import ShareSampler
from ..distillation.distiller import Distiller
from ..distillation.stored_teacher import StoredTeacher
from ..losses.criterion import ModelCriterion
from ..methods import DistillationMethod
from .config import DistillationConfig


def has_unlabeled(dataset: Any) -> bool:
    """True if some images have no labels."""
    return isinstance(dataset, DetectionDataset) and not dataset.labeled().all()


def with_answers(
    dataset: Any, teacher: StoredTeacher, methods: Sequence[DistillationMethod], args: DistillationConfig
) -> DetectionDataset:
    """The training set with a teacher's stored answers, and with its detections where labels are unknown.

    Raises:
        ValueError: the answers are those to other images or questions.
    """
    unlabeled = has_unlabeled(dataset)
    threshold = args.pseudo_threshold if unlabeled else None
    teacher.check(dataset, methods, args.teacher_image_size, args.teacher_model_name_or_path, threshold)
    answers = teacher.labeling(args.pseudo_threshold, args.pseudo_labels) if unlabeled else teacher.answers
    found: DetectionDataset = dataset.with_answers(answers)
    return found


def share_sampler(dataset: Any, args: DistillationConfig, batch_size: int) -> Sampler[int] | None:
    """The order of the images if some have no labels; otherwise `None`."""
    if not has_unlabeled(dataset):
        return None
    return ShareSampler(dataset, batch_size, args.unlabeled_fraction, args.seed)


def check_unlabeled(dataset: Any, distiller: Distiller) -> None:
    """
    Raises:
        ValueError: there are images without labels that the run cannot train on.
    """
    if not has_unlabeled(dataset):
        return
    if not isinstance(distiller.teacher, StoredTeacher):
        raise ValueError(
            "Images without labels are taught by stored answers of a teacher: set --teacher_answers auto, or a folder "
            "of hf-detrkd answer."
        )
    if isinstance(distiller.adapter.criterion, ModelCriterion):
        raise ValueError(
            f"A {distiller.adapter.spec.family} student computes its detection loss itself here, which cannot leave "
            "out images without labels: leave out --unlabeled_dataset_name, --labeled_fraction and --criterion "
            "transformers, or choose another student."
        )
