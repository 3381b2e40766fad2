"""Checks before the first step: the teacher's mAP and view, the value and gradient of each loss term, and the
calibration of their weights.

Each check takes the parts that it needs and returns text or weights; the trainer prints and stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from ..distillation.distiller import Distiller
from ..distillation.teacher import Teacher
from ..evaluation import class_figures
from ..methods import DistillationMethod
from ..structures.loss_key import LossKey
from .loss_probe import Precision, Probe, calibrate, probe


PROBED = 4  # batches: a term that is zero in one may be there in the next
REDRAWN = 20  # times that a batch without a box is drawn again
CAUSES = (
    "the order of its classes (see the class map, --class_map)",
    "its preprocessing (pixel normalisation and size: --teacher_image_size, the teacher's image processor)",
    "the frame of its boxes (trained on boxes relative to a padded canvas, or in pixels)",
    "the teacher itself: too little trained, on other images, or with predictions that are not finite",
)


def spread_sample(dataset: Any, most: int) -> Any:
    """At most a number of items, evenly spread over a data set; 0 for all of them."""
    count = min(len(dataset), most or len(dataset))
    if count == len(dataset):
        return dataset
    return Subset(dataset, np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist())


def first_dataset(datasets: Any) -> Any:
    """The first of several evaluation sets, or the only one; `None` if it has no length."""
    first = next(iter(datasets.values())) if isinstance(datasets, dict) else datasets
    return first if isinstance(first, Sized) else None


def check_teacher(
    teacher: Teacher, metrics: Mapping[str, float], id2label: Mapping[int, str], images: int, least: float
) -> str | None:
    """Judges a teacher by its metrics, over the classes that it knows.

    Args:
        teacher ([`Teacher`])
        metrics (`dict[str, float]`): see [`evaluate_teacher`].
        id2label (`dict[int, str]`): the student's classes.
        images (`int`): number of images behind the metrics.
        least (`float`): lowest mAP that is accepted.

    Returns:
        `str`: a sentence with its mAP; `None` if the images show no class of the teacher.

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
            f"The teacher has a mAP of {found:.3f} on {images} evaluation images, below the required minimum of "
            f"{least:g}: distilling from it would hurt. Likely causes:\n{causes}\nSet --min_teacher_map 0 to train "
            f"anyway. Its classes:\n{teacher.class_map.table()}"
        )
    return f"The teacher has a mAP of {found:.3f} on {images} evaluation images."


def check_view(batch: Mapping[str, Any], teacher_image_size: str) -> None:
    """Checks that a batch holds the teacher's own view if its size differs from the student's.

    Raises:
        ValueError: it does not.
    """
    size = "x".join(map(str, batch["pixel_values"].shape[-2:]))
    if "teacher_pixel_values" not in batch and teacher_image_size not in (size, size.split("x")[0]):
        raise ValueError(
            f"teacher_image_size is {teacher_image_size}, but the data set yields no teacher_pixel_values, and the "
            f"student's images have {size} pixels: give DetectionTransform the teacher_size."
        )


@dataclass(frozen=True)
class ProbedTerms:
    """The terms of the first batch, and those that a gate kept at zero in all batches."""

    probe: Probe
    silent: list[str]


def probe_terms(distiller: Distiller, batches: Iterable[Mapping[str, Any]], precision: Precision) -> ProbedTerms:
    """Measures every term on a batch; if a term is zero, also on further batches.

    Args:
        distiller ([`Distiller`]): stays as it is.
        batches: what the distiller takes, on its device.
        precision: see [`Precision`].

    Raises:
        ValueError: a term is not finite, or is zero or does not reach the student in all batches.
    """
    seen: list[Probe] = []
    faults: dict[str, str] = {}
    for batch in batches:
        found = probe(distiller, batch, precision)
        # A term is off only if all its layers are: a key may weigh single layers.
        weights = {t.name: max(map(abs, distiller.weights_of(cast(LossKey, t.name)))) for t in found.terms}
        now = found.faults(weights)
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
    """Weights with which each term's gradient has a fraction of the length of the task loss's.

    Args:
        distiller ([`Distiller`]): stays as it is.
        batches: `count` of what the distiller takes, on its device.
        count (`int`): training steps of a throw-away copy.
        learning_rate, max_grad_norm (`float`): of the training.
        fraction (`float`): of the gradient's norm.
        precision: see [`Precision`].
        gather: stacks a tensor of every process.

    Raises:
        ValueError: a term had no gradient in any step.
    """
    ratios = calibrate(distiller, batches, count, learning_rate, max_grad_norm, precision)
    # The same keys in the same order on every process; NaN where a term was silent.
    device = next(distiller.student.parameters()).device
    everyone = gather(torch.tensor([list(ratios.values())], device=device)).nanmean(0)
    weights = dict(distiller.loss_weights)
    for name, ratio in zip(ratios, everyone.tolist(), strict=True):
        if weights[name] and ratio != ratio:
            raise ValueError(
                f"No weight can be found for {name}: in {count} steps no gradient of it reached the student, or the "
                "task loss was not finite. Set its weight to 0, or lower --learning_rate."
            )
        if ratio == ratio:
            weights[name] *= fraction * ratio
    return weights


def batches_with_boxes(
    dataset: Any, collate: Callable[[list[Any]], dict[str, Any]], size: int, count: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Batches of random training images; a batch without a box is drawn again, a few times.

    Args:
        dataset: with a length.
        collate: the data collator.
        size, count (`int`): images of a batch, and batches.
        seed (`int`): different on each process.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for _ in range(REDRAWN):
            places = torch.randint(len(dataset), (size,), generator=generator).tolist()
            batch = collate([dataset[place] for place in places])
            if any(len(label["class_labels"]) for label in batch["labels"]):
                break
        yield batch
