"""The vocabulary that every room of the house shares: what detectors are asked, and what they answer.

It knows tensors and nothing else; the words for the truth are in [`~hf_detrkd.structures.targets`].

Boxes are always `(center_x, center_y, width, height)` in [0, 1] of the image (not of the padded canvas).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor


Activation = Literal["sigmoid", "softmax"]

WHOLE_IMAGE = (0.5, 0.5, 1.0, 1.0)
"""The box that stands where there is none to look at."""


@dataclass(frozen=True)
class ObjectQueries:
    """A set of queries that a decoder can be asked. A field that a family has no use for is `None`.

    Attributes:
        content (`torch.Tensor` of shape `(batch_size, num_queries, width)`): what the first decoder layer starts from.
        position (`torch.Tensor` of shape `(batch_size, num_queries, width)`): learned position embeddings; they mean
            something only to the model (or an equal one) that learned them.
        points (`torch.Tensor` of shape `(batch_size, num_queries, 2)`): reference points, (x, y) in [0, 1].
        boxes (`torch.Tensor` of shape `(batch_size, num_queries, 4)`): reference boxes.
        rows (`torch.LongTensor` of shape `(batch_size, num_queries)`): the encoder token that each query of a
            two-stage detector was selected from, an index into its flattened levels.
        groups (`torch.LongTensor` of shape `(batch_size, num_queries)`): queries see only those of their image with
            the same number; `None` where all see each other.
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
        """Where the queries look, `(batch_size, num_queries, 2)`: a box serves as a point, at its centre."""
        return self.points if self.boxes is None else self.boxes[..., :2]

    def detach(self) -> ObjectQueries:
        return ObjectQueries(**{name: value.detach() for name, value in self.tensors.items()})

    def float(self) -> ObjectQueries:
        """The same queries in float32, whatever precision made them; `rows` stay integers."""
        tensors = self.tensors.items()
        return ObjectQueries(**{name: t.float() if t.is_floating_point() else t for name, t in tensors})

    def select(self, names: frozenset[str]) -> ObjectQueries:
        """The same queries with only the given fields."""
        return ObjectQueries(**{name: value for name, value in self.tensors.items() if name in names})


@dataclass(frozen=True)
class Predictions:
    """What one decoder layer answers.

    Attributes:
        logits (`torch.Tensor` of shape `(batch_size, num_queries, num_classes)`): with `activation="softmax"` one more
            column follows, no-object, always the last.
        boxes (`torch.Tensor` of shape `(batch_size, num_queries, 4)`)
        hidden_states (`torch.Tensor` of shape `(batch_size, num_queries, width)`, *optional*)
        activation (`"sigmoid"` or `"softmax"`): how logits become probabilities.
        known (`torch.BoolTensor` of shape `(num_classes,)`, *optional*): classes that a teacher with other classes
            knows; what it says of the rest means nothing. `None` where it knows all.
        class_boxes (`torch.Tensor` of shape `(batch_size, num_queries, num_classes, 4)`, *optional*): where the head
            has a box for every class; `boxes` are then those of the best one.
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
        logits = self.logits.float()
        return logits.softmax(-1)[..., :-1] if self.activation == "softmax" else logits.sigmoid()

    def boxes_of(self, labels: Tensor) -> Tensor:
        """The boxes of given classes `(batch_size, num_queries)`; of any class where the head does not tell them
        apart."""
        if self.class_boxes is None:
            return self.boxes
        return self.class_boxes.gather(2, labels[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)

    def detach(self) -> Predictions:
        return self._each(Tensor.detach)

    def rows(self, start: int, stop: int | None) -> Predictions:
        """The answers of some of the queries."""
        return self._each(lambda values: values[:, start:stop])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Predictions:
        """The same answers with every tensor of queries changed."""
        tensors = {name: vars(self)[name] for name in ("logits", "boxes", "hidden_states", "class_boxes")}
        changed: dict[str, Any] = {name: change(values) for name, values in tensors.items() if values is not None}
        return replace(self, **changed)


@dataclass(frozen=True)
class FeatureMap:
    """One level of features: `values` `(batch_size, channels, height, width)`, `padding` `(batch_size, height, width)`
    bool, true where a cell is padding; `None` when nothing is padded."""

    values: Tensor
    padding: Tensor | None = None


@dataclass(frozen=True)
class Proposals:
    """Boxes that a detector proposed in training and compares with the ground truth, padded to the image with most.

    Attributes:
        boxes (`torch.Tensor` of shape `(batch_size, num_proposals, 4)`): cxcywh in [0, 1], without gradient.
        labels (`torch.LongTensor` of shape `(batch_size, num_proposals)`): class of each, -1 for background.
        matched (`torch.Tensor` of shape `(batch_size, num_proposals, 4)`): the ground-truth box of each; where it is
            background it means nothing.
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
    """What a method needs to know of a detector before the first image.

    Attributes:
        family (`str`): transformers' `model_type`, with the form after a slash where it has several.
        query_fields (`frozenset[str]`): fields of [`ObjectQueries`] that its decoder takes from outside.
        width (`int`): channels of its decoder states.
        num_layers (`int`): decoder layers.
        num_queries (`int`): own queries.
        num_classes (`int`): classes without no-object.
        activation: see [`Predictions`].
        features (`dict[str, tuple[int, ...]]`): channels of each level, by place: `"neck"` and `"encoder"`.
        one_to_one (`bool`): whether exactly one query is to answer for an object (set prediction), or every box that
            overlaps it enough, duplicates being removed afterwards.
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


@dataclass(frozen=True)
class DetectorOutput:
    """One forward pass of a detector, with the means to ask its decoder again.

    Attributes:
        layers (`tuple[Predictions]`): every decoder layer's answer to the detector's own queries, last one last.
        queries ([`ObjectQueries`]): those own queries.
        features (`dict[str, tuple[FeatureMap]]`): `"neck"`: projected maps that enter the encoder; `"encoder"`: the
            memory that the decoder reads, as maps. Empty tuple where a family has none.
        decode (`Callable[[ObjectQueries], tuple[Predictions, ...]]`): asks other queries of the same memory. Queries
            never see each other across calls; gradients reach the encoder and the backbone.
        loss (`torch.Tensor`, *optional*): the detection loss, when targets were given and the model trains.
        proposals ([`Proposals`], *optional*): of a detector that is not one-to-one, in training.
        detections ([`Predictions`], *optional*): what is left of the answers after duplicates are removed, where that
            is not done by the decoder.
    """

    layers: tuple[Predictions, ...]
    queries: ObjectQueries
    features: dict[str, tuple[FeatureMap, ...]]
    decode: Callable[[ObjectQueries], tuple[Predictions, ...]]
    loss: Tensor | None = None
    proposals: Proposals | None = None
    detections: Predictions | None = None

    @property
    def found(self) -> Predictions:
        """What the detector says is in the images."""
        return self.layers[-1] if self.detections is None else self.detections
