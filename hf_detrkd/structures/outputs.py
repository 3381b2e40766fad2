"""Data structures for the inputs and outputs of detectors, shared by all subpackages.

They hold only tensors. Structures for the ground truth are in [`~hf_detrkd.structures.targets`].

Boxes are always `(center_x, center_y, width, height)` in [0, 1] of the image (not of the padded canvas).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .supervision import Supervision


Activation = Literal["sigmoid", "softmax"]

WHOLE_IMAGE = (0.5, 0.5, 1.0, 1.0)
"""Placeholder box, cxcywh, where no proposal is available."""


@dataclass(frozen=True)
class ObjectQueries:
    """A set of decoder queries. Fields that a family does not use are `None`.

    Attributes:
        content (`torch.Tensor` of shape `(batch_size, num_queries, width)`): input of the first decoder layer.
        position (`torch.Tensor` of shape `(batch_size, num_queries, width)`): learned position embeddings; only
            meaningful to the model that learned them, or to one of the same family and width.
        points (`torch.Tensor` of shape `(batch_size, num_queries, 2)`): reference points, (x, y) in [0, 1].
        boxes (`torch.Tensor` of shape `(batch_size, num_queries, 4)`): reference boxes.
        rows (`torch.LongTensor` of shape `(batch_size, num_queries)`): encoder token that each query of a two-stage
            detector was selected from, an index into its flattened levels.
        groups (`torch.LongTensor` of shape `(batch_size, num_queries)`): queries attend only to those of their image
            with the same number; `None` if all attend to each other.
    """

    content: Tensor | None = None
    position: Tensor | None = None
    points: Tensor | None = None
    boxes: Tensor | None = None
    rows: Tensor | None = None
    groups: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that hold a tensor, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def fields(self) -> frozenset[str]:
        """Names of the fields that hold a tensor."""
        return frozenset(self.tensors)

    @property
    def size(self) -> int:
        """Number of queries."""
        return next(value.shape[1] for value in self.tensors.values())

    @property
    def centers(self) -> Tensor | None:
        """Reference points `(batch_size, num_queries, 2)`: the centres of `boxes` if set, else `points`."""
        return self.points if self.boxes is None else self.boxes[..., :2]

    def detach(self) -> ObjectQueries:
        return ObjectQueries(**{name: value.detach() for name, value in self.tensors.items()})

    def float(self) -> ObjectQueries:
        """The same queries in float32; integer fields keep their type."""
        tensors = self.tensors.items()
        return ObjectQueries(**{name: t.float() if t.is_floating_point() else t for name, t in tensors})

    def select(self, names: frozenset[str]) -> ObjectQueries:
        """The same queries with only the given fields."""
        return ObjectQueries(**{name: value for name, value in self.tensors.items() if name in names})


@dataclass(frozen=True)
class Predictions:
    """Predictions of one decoder layer, or of several with a first dimension for the layers, see [`stacked`].

    Attributes:
        logits (`torch.Tensor` of shape `(batch_size, num_queries, num_classes)`): with `activation="softmax"` there is
            one more column, no-object, always the last.
        boxes (`torch.Tensor` of shape `(batch_size, num_queries, 4)`)
        hidden_states (`torch.Tensor` of shape `(batch_size, num_queries, width)`, *optional*)
        activation (`"sigmoid"` or `"softmax"`): turns logits into probabilities.
        known (`torch.BoolTensor` of shape `(num_classes,)`, *optional*): student classes that the teacher knows; its
            scores of the others are meaningless. `None` if it knows all. Of several teachers those of each query,
            `(batch_size, num_queries, num_classes)`.
        class_boxes (`torch.Tensor` of shape `(batch_size, num_queries, num_classes, 4)`, *optional*): boxes of a head
            that predicts one per class; `boxes` are then those of the best class.
    """

    logits: Tensor
    boxes: Tensor
    hidden_states: Tensor | None = None
    activation: Activation = "sigmoid"
    known: Tensor | None = None
    class_boxes: Tensor | None = None

    @property
    def num_classes(self) -> int:
        return self.logits.shape[-1] - (self.activation == "softmax")

    def scores(self) -> Tensor:
        """Class probabilities without no-object, float32, `(batch_size, num_queries, num_classes)`."""
        return scores_of(self.logits, self.activation)

    def boxes_of(self, labels: Tensor) -> Tensor:
        """The boxes for given classes `(batch_size, num_queries)`; `boxes` if the head is class-agnostic."""
        if self.class_boxes is None:
            return self.boxes
        index = labels[..., None, None].expand(*self.boxes.shape[:-1], 1, 4)
        return self.class_boxes.gather(-2, index).squeeze(-2)

    def detach(self) -> Predictions:
        return self._each(Tensor.detach)

    def rows(self, start: int, stop: int | None) -> Predictions:
        """The predictions of queries `start` to `stop`."""
        return self._each(lambda values: values[:, start:stop])

    def of_images(self, rows: Tensor) -> Predictions:
        """The predictions for the images `rows` `(num_images,)`."""
        return self._each(lambda values: values.index_select(0, rows))

    def at(self, rows: Tensor) -> Predictions:
        """The predictions of the queries `rows` `(batch_size, num_places)`, without gradient."""

        def pick(values: Tensor) -> Tensor:
            index = rows.reshape(*rows.shape, *[1] * (values.dim() - 2)).expand(*rows.shape, *values.shape[2:])
            return values.detach().gather(1, index)

        return self._each(pick)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Predictions:
        """The same predictions with `change` applied to every per-query tensor."""
        tensors = {name: vars(self)[name] for name in ("logits", "boxes", "hidden_states", "class_boxes")}
        changed: dict[str, Any] = {name: change(values) for name, values in tensors.items() if values is not None}
        return replace(self, **changed)


def stacked(layers: Sequence[Predictions]) -> Predictions:
    """Predictions of several layers in one, `(num_layers, batch_size, num_queries, ...)`, so that a loss is computed
    for all of them at once; without decoder states. All layers have the activation and known classes of the first."""
    logits, boxes = (torch.stack([vars(layer)[name] for layer in layers]) for name in ("logits", "boxes"))
    class_boxes = [layer.class_boxes for layer in layers if layer.class_boxes is not None]
    return replace(
        layers[0],
        logits=logits,
        boxes=boxes,
        hidden_states=None,
        class_boxes=torch.stack(class_boxes) if class_boxes else None,
    )


def scores_of(logits: Tensor, activation: Activation) -> Tensor:
    """Class probabilities without no-object, float32, `(..., num_classes)`."""
    logits = logits.float()
    return logits.softmax(-1)[..., :-1] if activation == "softmax" else logits.sigmoid()


@dataclass(frozen=True)
class FeatureMap:
    """One level of a feature pyramid.

    Attributes:
        values (`torch.Tensor` of shape `(batch_size, channels, height, width)`)
        padding (`torch.BoolTensor` of shape `(batch_size, height, width)`, *optional*): true where a cell is padding;
            `None` if nothing is padded.
    """

    values: Tensor
    padding: Tensor | None = None


@dataclass(frozen=True)
class Proposals:
    """Training proposals of a detector with their matched ground truth, padded to the image with most proposals.

    Attributes:
        boxes (`torch.Tensor` of shape `(batch_size, num_proposals, 4)`): cxcywh in [0, 1], without gradient.
        labels (`torch.LongTensor` of shape `(batch_size, num_proposals)`): class of each, -1 for background.
        matched (`torch.Tensor` of shape `(batch_size, num_proposals, 4)`): ground-truth box of each; undefined for
            background.
        valid (`torch.BoolTensor` of shape `(batch_size, num_proposals)`): false for padding.
        added (`torch.BoolTensor` of shape `(batch_size, num_proposals)`): ground-truth boxes among the proposals.
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor
    valid: Tensor
    added: Tensor

    @property
    def foreground(self) -> Tensor:
        return self.valid & (self.labels >= 0)


@dataclass(frozen=True)
class DetectorSpec:
    """Static properties of a detector, known from its config.

    Attributes:
        family (`str`): transformers' `model_type`, followed by a slash and the variant if there are several.
        query_fields (`frozenset[str]`): fields of [`ObjectQueries`] that its decoder accepts from outside.
        width (`int`): channels of its decoder states.
        num_layers (`int`): number of decoder layers.
        num_queries (`int`): number of the model's own queries.
        num_classes (`int`): number of classes without no-object.
        activation: see [`Predictions`].
        features (`dict[str, tuple[int, ...]]`): channels of each level of the `"neck"` and `"encoder"` maps.
        one_to_one (`bool`): true for set prediction, one query per object; false if every box that overlaps an object
            enough predicts it and duplicates are removed afterwards.
        max_detections (`int`, *optional*): detections per image that the post-processing of the authors' code keeps.
            `None`: as many as there are queries.
        supervision ([`Supervision`], *optional*): the family's loss of queries with the ground truth; `None` for a
            family whose loss is not one of set prediction, or not ours.
    """

    family: str
    query_fields: frozenset[str]
    width: int
    num_layers: int
    num_queries: int
    num_classes: int
    activation: Activation
    features: dict[str, tuple[int, ...]] = field(default_factory=dict)
    one_to_one: bool = True
    max_detections: int | None = None
    supervision: Supervision | None = None


@dataclass(frozen=True)
class DetectorOutput:
    """Output of one forward pass, with a function that decodes further queries.

    Attributes:
        layers (`tuple[Predictions]`): predictions of every decoder layer for the model's own queries, last layer last.
        queries ([`ObjectQueries`]): the model's own queries.
        features (`dict[str, tuple[FeatureMap]]`): `"neck"`: projected maps that enter the encoder; `"encoder"`: the
            memory that the decoder reads, as maps. Empty tuple if a family has none.
        decode (`Callable[[ObjectQueries], tuple[Predictions, ...]]`): runs the decoder with other queries on the same
            memory. Queries of different calls never attend to each other; gradients reach encoder and backbone.
        loss (`torch.Tensor`, *optional*): the detection loss, if targets were given.
        proposals ([`Proposals`], *optional*): training proposals of a detector that is not one-to-one.
        detections ([`Predictions`], *optional*): predictions after duplicate removal, if the detector uses NMS.
        decoded (`dict[str, tuple[Predictions, ...]]`, *optional*): for stored outputs, which cannot `decode`: the
            predictions for extra queries, by `<method>/<request>`.
    """

    layers: tuple[Predictions, ...]
    queries: ObjectQueries
    features: dict[str, tuple[FeatureMap, ...]]
    decode: Callable[[ObjectQueries], tuple[Predictions, ...]]
    loss: Tensor | None = None
    proposals: Proposals | None = None
    detections: Predictions | None = None
    decoded: Mapping[str, tuple[Predictions, ...]] | None = None

    @property
    def found(self) -> Predictions:
        """The final detections: `detections` if set, else the last layer's predictions."""
        return self.layers[-1] if self.detections is None else self.detections
