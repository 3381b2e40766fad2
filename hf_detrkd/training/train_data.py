"""The training set of a run: with stored answers, and with images that nobody labelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Sampler

from ..adapters import DetectorAdapter
from ..data import DetectionDataset, DetectionStream
from ..data.image_size import ImageSize
from ..data.share_sampler import ShareSampler
from ..distillation.distiller import Distiller
from ..distillation.stored_teacher import StoredTeacher
from ..distillation.teacher import Teacher
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


def check_sizes(datasets: Sequence[Any], distiller: Distiller) -> None:
    """Checks that student and teacher take images of the size that the data sets make.

    Raises:
        ValueError: a side is no multiple of what a family needs.
    """
    ours = [data for data in datasets if isinstance(data, DetectionDataset | DetectionStream)]
    seen = [data.transform for data in ours if data.transform is not None]
    teacher = distiller.teacher
    for transform in seen:
        check_size(distiller.adapter, transform.size)
        if isinstance(teacher, Teacher):
            check_size(teacher.adapter, transform.teacher_size or transform.size)


def check_size(adapter: DetectorAdapter, size: ImageSize) -> None:
    """
    Raises:
        ValueError: a fixed size whose sides are no multiples of what the family needs.
    """
    sides, divisor = (size.height, size.width), adapter.size_divisor
    if size.keeps_ratio or not any(side % divisor for side in sides):
        return
    near = "x".join(str(max(divisor, round(side / divisor) * divisor)) for side in sides)
    raise ValueError(
        f"{adapter.spec.family} takes images whose sides are multiples of {divisor} pixels, got "
        f"{sides[0]}x{sides[1]}: set --image_size {near}, or --teacher_image_size for the teacher alone."
    )


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
