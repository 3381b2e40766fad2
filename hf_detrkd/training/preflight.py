"""Pre-training checks: the teacher's mAP and images, the value and gradient of each loss term, and the
calibration of their weights.

Each check takes the parts that it needs and returns text or weights; the trainer prints and stores them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from ..data import RowStream
from ..data.stream import Progress, Reading
from ..distillation.distiller import Distiller
from ..distillation.stored_teacher import StoredTeacher
from ..distillation.teacher import Teacher
from ..evaluation import class_figures
from ..methods import DistillationMethod
from ..structures.loss_key import LossKey
from ..structures.targets import known_labels
from .loss_probe import Precision, Probe, calibrate, probe


PROBED = 4  # batches: a term that is zero in one may be positive in the next
REDRAWN = 20  # attempts to draw a batch that has boxes
CAUSES = (
    "the order of its classes (see the class map, --class_map)",
    "its preprocessing (pixel normalisation and size: --teacher_image_size, the teacher's image processor)",
    "the format of its boxes (trained on boxes relative to a padded canvas, or in pixels)",
    "the teacher itself: undertrained, trained on other images, or with predictions that are not finite",
)


def spread_sample(dataset: Any, most: int) -> Any:
    """At most `most` items, evenly spread over a data set; 0 for all."""
    count = min(len(dataset), most or len(dataset))
    if count == len(dataset):
        return dataset
    return Subset(dataset, np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist())


def first_dataset(datasets: Any) -> Any:
    """The first of several evaluation sets, or the only one; `None` if it has no length."""
    first = next(iter(datasets.values())) if isinstance(datasets, dict) else datasets
    return first if isinstance(first, Sized) else None


def first_name(datasets: Any) -> str | None:
    """The name of the first of several evaluation sets; `None` for a single one."""
    return next(iter(datasets), None) if isinstance(datasets, dict) else None


def check_teacher(
    teacher: Teacher | StoredTeacher,
    metrics: Mapping[str, float],
    id2label: Mapping[int, str],
    images: int,
    least: float,
) -> str | None:
    """Checks a teacher's mAP over the classes that it knows.

    Args:
        teacher ([`Teacher`])
        metrics (`dict[str, float]`): see [`evaluate_teacher`].
        id2label (`dict[int, str]`): the student's classes.
        images (`int`): number of images that the metrics are from.
        least (`float`): minimum mAP.

    Returns:
        `str`: a sentence with its mAP; `None` if the images contain none of its classes.

    Raises:
        ValueError: its mAP is too low; the message lists the likely causes.
    """
    names = class_figures(dict(id2label))
    known = [names[i] for i, column in enumerate(teacher.class_map.columns) if column is not None]
    values = [metrics[f"teacher_{name}"] for name in known if metrics[f"teacher_{name}"] >= 0]
    if not values:
        return None
    found = sum(values) / len(values)
    if not found >= least:
        causes = "\n".join(f"  - {cause}" for cause in CAUSES)
        raise ValueError(
            f"The teacher has {100 * found:.1f} mAP on {images} evaluation images, below the required minimum of "
            f"{100 * least:g}: distilling from it would hurt. Likely causes:\n{causes}\nSet --min_teacher_map 0 to "
            f"train anyway. Its classes:\n{teacher.class_map.table()}"
        )
    return f"The teacher has {100 * found:.1f} mAP on {images} evaluation images."


def check_view(batch: Mapping[str, Any], teacher_image_size: str) -> None:
    """Checks that a batch holds `teacher_pixel_values` if the teacher's image size differs from the student's.

    Raises:
        ValueError: it does not.
    """
    size = "x".join(map(str, batch["pixel_values"].shape[-2:]))
    if "teacher_pixel_values" not in batch and teacher_image_size != size:
        raise ValueError(
            f"teacher_image_size is {teacher_image_size}, but the data set yields no teacher_pixel_values, and the "
            f"student's images have {size} pixels: pass teacher_size to DetectionTransform."
        )


@dataclass(frozen=True)
class ProbedTerms:
    """The terms of the first batch, and the names of those that a gate kept at zero in all batches."""

    probe: Probe
    silent: list[str]


def probe_terms(
    distiller: Distiller, batches: Iterable[Mapping[str, Any]], precision: Precision, most: float = 0.0
) -> ProbedTerms:
    """Measures every term on a batch; if a term is faulty, also on further batches.

    Args:
        distiller ([`Distiller`]): is left unchanged.
        batches: inputs of the distiller, on its device.
        precision: see [`Precision`].
        most (`float`): largest gradient norm of a term, relative to the task loss's; 0 for no limit.

    Raises:
        ValueError: a term is not finite, or in all batches it is zero, has no gradient to the student or one that is
            too large.
    """
    seen: list[Probe] = []
    faults: dict[str, str] = {}
    for batch in batches:
        found = probe(distiller, batch, precision)
        # A term is disabled only if all its layers are: a key may set the weight of single layers.
        weights = {t.name: max(map(abs, distiller.weights_of(cast(LossKey, t.name)))) for t in found.terms}
        now = found.faults(weights, most)
        faults = {name: fault for name, fault in now.items() if not seen or name in faults}
        seen.append(found)
        if not faults:
            break
    gated = any(cast(DistillationMethod, method).gated for method in distiller.methods.values())
    silent = [name for name, fault in faults.items() if fault == "zero"] if gated else []
    seen[0].refuse({name: fault for name, fault in faults.items() if name not in silent})
    return ProbedTerms(seen[0], silent)


def calibrated_weights(
    distiller: Distiller,
    batches: Iterable[Mapping[str, Any]],
    count: int,
    learning_rate: float,
    max_grad_norm: float,
    fraction: float,
    precision: Precision,
    gather: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Weights at which each term's gradient norm is a given fraction of the task loss's.

    Args:
        distiller ([`Distiller`]): is left unchanged, its loss weights included.
        batches: `count` inputs of the distiller, on its device.
        count (`int`): training steps, which are undone afterwards.
        learning_rate, max_grad_norm (`float`): of the training.
        fraction (`float`): of the task loss's gradient norm.
        precision: see [`Precision`].
        gather: stacks a tensor of all processes.

    Raises:
        ValueError: a term had no gradient in any step.
    """
    ratios = calibrate(distiller, batches, count, learning_rate, max_grad_norm, precision)
    # The same keys in the same order on every process; NaN if a term had no gradient.
    device = next(distiller.student.parameters()).device
    own = [(math.nan, 0.0) if ratio is None else (ratio, 1.0) for ratio in ratios.values()]
    everyone = gather(torch.tensor([own], device=device)).nanmean(0)
    weights = dict(distiller.loss_weights)
    for name, (ratio, used) in zip(ratios, everyone.tolist(), strict=True):
        if used and weights[name] and ratio != ratio:
            raise ValueError(
                f"The weight of {name} cannot be calibrated: in {count} steps it had no gradient to the student, or "
                "the task loss was not finite. Set its weight to 0, or lower --learning_rate."
            )
        if ratio == ratio:
            weights[name] *= fraction * ratio
    return weights


def first_batches(
    stream: RowStream,
    collate: Callable[[list[Any]], dict[str, Any]],
    size: int,
    count: int,
    process: int,
    processes: int,
) -> Iterator[dict[str, Any]]:
    """The first batches of a stream; a batch without a box is passed over, up to 20 times.

    Args:
        stream ([`RowStream`])
        collate: the data collator.
        size, count (`int`): images per batch, and number of batches.
        process, processes (`int`): the number of this process, and of all.
    """
    items = (item for _, item in Reading(stream, [Progress(process)], processes))
    for _ in range(count):
        for _ in range(REDRAWN):
            batch = collate(list(islice(items, size)))
            if any(len(label["class_labels"]) for label in known_labels(batch["labels"])):
                break
        yield batch


def batches_with_boxes(
    dataset: Any, collate: Callable[[list[Any]], dict[str, Any]], size: int, count: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Batches of random training images; a batch without a box is drawn again, up to 20 times.

    Args:
        dataset: with a length.
        collate: the data collator.
        size, count (`int`): images per batch, and number of batches.
        seed (`int`): different on each process.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for _ in range(REDRAWN):
            places = torch.randint(len(dataset), (size,), generator=generator).tolist()
            batch = collate([dataset[place] for place in places])
            if any(len(label["class_labels"]) for label in known_labels(batch["labels"])):
                break
        yield batch
