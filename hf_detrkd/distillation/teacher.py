"""Frozen teacher detector with its own precision, normalisation and class order."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..adapters import adapter_for
from ..adapters import class_names as class_names_of
from ..data.processor import NO_NORMALIZATION, Normalization
from ..data.text import there
from ..losses.functional import UNKNOWN
from ..structures.outputs import DetectorOutput, DetectorSpec, ObjectQueries, Predictions
from .class_map import ClassMap


@dataclass(frozen=True)
class Origin:
    """Source that a model was loaded from.

    Attributes:
        name (`str`): Hub id, folder, or the model type if the model was given in memory.
        source (`str`): `hub`, `folder` or `memory`.
        revision (`str`, *optional*): commit on the Hub, or `None` if unknown.
    """

    name: str
    source: Literal["hub", "folder", "memory"]
    revision: str | None = None

    @classmethod
    def of(cls, name: str | None, model_type: str, revision: str | None = None) -> Origin:
        """The origin of a model. Call it right after loading, before the branch on the Hub changes.

        Args:
            name (`str`, *optional*): Hub id or folder; `None` for a model in memory.
            model_type (`str`): name for a model in memory.
            revision (`str`, *optional*): branch, tag or commit that was loaded; `None` if unknown.
        """
        if not name:
            return cls(model_type, "memory")
        if there(name):
            return cls(name, "folder")
        return cls(name, "hub", None if revision is None else _commit_of(name, revision))


def _commit_of(repo_id: str, revision: str) -> str:
    """Commit of a revision, from the local Hub cache; the revision itself if it is not cached."""
    file = try_to_load_from_cache(repo_id, CONFIG_NAME, revision=revision)
    return Path(file).parent.name if isinstance(file, str) else revision


class Teacher:
    """A detector in eval mode, without gradient, in its own precision and with its own pixel normalisation.

    Deliberately not a `torch.nn.Module`, so that optimizers, checkpoints and DDP wrappers, which walk the module tree,
    do not include its weights.

    Args:
        model ([`~transformers.PreTrainedModel`]): frozen in place, its weights in float32, those of linear and
            convolution layers in `dtype`.
        class_names (`Sequence[str]`): the student's classes; predictions are reordered to them and mark the classes
            that the teacher knows: see [`ClassMap`].
        dtype (`torch.dtype`): 16-bit types run under autocast, so that boxes and softmax stay in float32. (A model
            with all its weights in 16 bits would round reference points to a fifth of a cell, and would clash with
            float32 queries in layers that need one dtype.)
        normalization ([`Normalization`]): normalisation that the teacher was trained with.
        student_normalization ([`Normalization`]): normalisation of the batches.
        class_map (`dict[str, str | None]`, *optional*): student class to teacher class, where the names differ.
        origin ([`Origin`], *optional*): source of the model. Default: derived from its config.

    Raises:
        ValueError: the teacher knows none of the classes, or `class_map` is wrong.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        class_names: Sequence[str],
        dtype: torch.dtype = torch.float32,
        normalization: Normalization = NO_NORMALIZATION,
        student_normalization: Normalization = NO_NORMALIZATION,
        class_map: Mapping[str, str | None] | None = None,
        origin: Origin | None = None,
    ):
        self.origin = origin or Origin.of(model.config.name_or_path, model.config.model_type)
        self.model = model.float().eval().requires_grad_(False)
        self.adapter = adapter_for(model)
        cast_matrices(model, dtype, self.adapter.full_precision)
        self.dtype = dtype
        self.class_map = ClassMap.match(class_names, class_names_of(model.config), class_map)
        self._in_student_order = StudentOrder(self.class_map)
        self._scale, self._shift = _renormalization(student_normalization, normalization)

    @property
    def members(self) -> list[Teacher]:
        """The teachers that it stands for: itself."""
        return [self]

    @property
    def spec(self) -> DetectorSpec:
        return self.adapter.spec

    @property
    def num_parameters(self) -> int:
        """Size of the model."""
        return int(self.model.num_parameters())

    def in_own_order(self) -> Teacher:
        """The same teacher, whose predictions have its own classes in its own order."""
        own = copy.copy(self)
        own.class_map = ClassMap.match(self.class_map.teacher, self.class_map.teacher)
        own._in_student_order = StudentOrder(own.class_map)
        return own

    def to(self, device: torch.device | str) -> Teacher:
        self.model.to(device)
        return self

    @contextmanager
    def _mode(self, device_type: str) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            low = self.dtype != torch.float32
            stack.enter_context(torch.autocast(device_type, self.dtype if low else None, enabled=low))
            yield

    def __call__(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> DetectorOutput:
        """Runs the teacher on a batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised for the student.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*)
        """
        device = pixel_values.device
        images = self._renormalize(pixel_values, pixel_mask)
        with self._mode(device.type):
            output, _ = self.adapter.encode(images, pixel_mask)

        def decode(queries: ObjectQueries) -> tuple[Predictions, ...]:
            with self._mode(device.type):
                return self._in_student_order(output.decode(queries))

        layers, detections = self._in_student_order(output.layers), output.detections
        if detections is not None:
            (detections,) = self._in_student_order((detections,))
        return replace(output, layers=layers, queries=output.queries.float(), decode=decode, detections=detections)

    def _renormalize(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
        if self._scale is None or self._shift is None:
            return pixel_values
        self._scale, self._shift = self._scale.to(pixel_values.device), self._shift.to(pixel_values.device)
        images = pixel_values * self._scale + self._shift
        return images if pixel_mask is None else images * pixel_mask[:, None]

    def of(self, batch: Mapping[str, Any]) -> DetectorOutput:
        """Runs the teacher on a collated batch, see [`teacher_view`]."""
        return self(*teacher_view(batch))


def cast_matrices(model: PreTrainedModel, dtype: torch.dtype, full: Collection[str]) -> None:
    """Stores the weights of linear and convolution layers in the type that autocast computes in, except in the parts
    `full`, which run without it.

    The results are the same, but autocast would cast these weights again in every pass: it only remembers those that
    need a gradient. Subclasses may compute with their weights outside of autocast's operations, so they are left.
    """
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Conv2d) and name.partition(".")[0] not in full:
            module.to(dtype)


def teacher_view(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Input of the teacher: `teacher_pixel_values` and their mask if in the batch, otherwise the student's images."""
    view = "teacher_" if batch.get("teacher_pixel_values") is not None else ""
    return batch[f"{view}pixel_values"], batch.get(f"{view}pixel_mask")


class StudentOrder:
    """Reorders the class columns of a teacher's predictions to the student's, and marks those that it knows.

    Args:
        class_map ([`ClassMap`])
    """

    def __init__(self, class_map: ClassMap):
        self.class_map = class_map
        self._columns: tuple[Tensor, Tensor] | None = None  # on the device: column order, known classes

    def __call__(self, layers: tuple[Predictions, ...]) -> tuple[Predictions, ...]:
        if self.class_map.is_identity or not layers:
            return layers
        logits = layers[0].logits
        if self._columns is None or self._columns[0].device != logits.device:
            columns = self.class_map.columns
            no_object = range(len(self.class_map.teacher), logits.shape[-1])  # the no-object column stays last
            order = torch.tensor([*(column or 0 for column in columns), *no_object], device=logits.device)
            self._columns = order, torch.tensor([column is not None for column in columns], device=logits.device)
        order, known = self._columns
        layers = tuple(_reordered(layer, order) for layer in layers)
        if self.class_map.is_complete:
            return layers
        answered = F.pad(known, (0, len(order) - len(known)), value=True)
        return tuple(
            replace(layer, logits=layer.logits.masked_fill(~answered, UNKNOWN), known=known) for layer in layers
        )


def _reordered(layer: Predictions, order: Tensor) -> Predictions:
    """Predictions with reordered class columns; `order` ends with no-object for softmax heads."""
    boxes, num_classes = layer.class_boxes, len(order) - (layer.activation == "softmax")
    if boxes is not None:
        boxes = boxes.index_select(2, order[:num_classes])
    return replace(layer, logits=layer.logits.index_select(-1, order), class_boxes=boxes)


def _renormalization(source: Normalization, goal: Normalization) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift `(3, 1, 1)` from the student's to the teacher's normalisation; `None` if they are equal."""
    if [list(map(float, part)) for part in source] == [list(map(float, part)) for part in goal]:
        return None, None
    mean, std, new_mean, new_std = (torch.tensor(part).view(-1, 1, 1) for part in (*source, *goal))
    return std / new_std, (mean - new_mean) / new_std
