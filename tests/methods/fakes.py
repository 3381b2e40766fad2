"""Detectors that are nothing but random answers, for tests of the methods' mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hf_detrkd.structures.outputs import DetectorOutput, DetectorSpec, FeatureMap, ObjectQueries, Predictions
from hf_detrkd.structures.supervision import Supervision
from hf_detrkd.structures.targets import Targets
from tests import tiny
from tests.methods.naive import Layer, Truth


HEADS = ("sigmoid", "softmax")


def spec(
    num_queries: int = 6,
    num_layers: int = 2,
    num_classes: int = 3,
    activation: str = "sigmoid",
    fields: str = "content boxes",
    width: int = 8,
    neck: Sequence[int] | None = None,
    family: str = "fake",
) -> DetectorSpec:
    neck = tuple(neck or (width,))
    return DetectorSpec(
        family=family,
        query_fields=frozenset(fields.split()),
        width=width,
        num_layers=num_layers,
        num_queries=num_queries,
        num_classes=num_classes,
        activation=activation,
        features={"neck": neck, "encoder": neck},
        supervision=Supervision("cross_entropy")
        if activation == "softmax"
        else Supervision("focal", class_weight=2.0),
    )


@dataclass
class Fake:
    """A detector without a network: every answer is random, and every one is kept.

    Attributes:
        trains: whether answers and maps are leaves that collect gradients.
        maps: height and width of each level; the last image of a `padded` batch is padded.
        asked: the queries of each `decode` call.
        answered: what each of them got.
    """

    spec: DetectorSpec
    batch_size: int = 2
    trains: bool = False
    maps: Sequence[tuple[int, int]] = ((4, 5),)
    padded: bool = False
    asked: list[ObjectQueries] = field(default_factory=list)
    answered: list[tuple[Predictions, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        sizes = {"content": self.spec.width, "position": self.spec.width, "points": 2, "boxes": 4}
        rows = self.batch_size, self.spec.num_queries
        self.output = DetectorOutput(
            self.answer(self.spec.num_queries),
            ObjectQueries(**{name: torch.rand(*rows, sizes[name]) for name in self.spec.query_fields}),
            {place: tuple(map(self._map, widths, self.maps)) for place, widths in self.spec.features.items()},
            self.decode,
        )

    def decode(self, queries: ObjectQueries) -> tuple[Predictions, ...]:
        self.asked.append(queries)
        self.answered.append(self.answer(next(getattr(queries, name) for name in queries.fields).shape[1]))
        return self.answered[-1]

    def answer(self, num_queries: int) -> tuple[Predictions, ...]:
        columns = self.spec.num_classes + (self.spec.activation == "softmax")
        rows = self.batch_size, num_queries
        return tuple(
            Predictions(
                (torch.randn(*rows, columns) * 2 - 1).requires_grad_(self.trains),
                tiny.random_boxes(*rows).requires_grad_(self.trains),
                torch.randn(*rows, self.spec.width),
                self.spec.activation,
            )
            for _ in range(self.spec.num_layers)
        )

    def _map(self, channels: int, size: tuple[int, int]) -> FeatureMap:
        padding = None
        if self.padded:
            padding = torch.zeros(self.batch_size, *size, dtype=torch.bool)
            padding[-1, size[0] // 2 :] = True
            padding[-1, :, size[1] * 3 // 4 :] = True
        return FeatureMap(torch.randn(self.batch_size, channels, *size).requires_grad_(self.trains), padding)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def targets_of(*counts: int, num_classes: int = 3) -> Targets:
    """Random ground truth with as many boxes in each image."""
    labels = [tiny.random_label(count) for count in counts]
    return Targets.from_labels([label | {"class_labels": label["class_labels"] % num_classes} for label in labels])


def by_image(layers: Sequence[Predictions]) -> list[list[Layer]]:
    """Answers as the oracle reads them: `[layer][image]`, in float64."""
    return [
        [
            Layer(logits.double(), boxes.double(), layer.activation, states.double())
            for logits, boxes, states in zip(layer.logits, layer.boxes, layer.hidden_states, strict=True)
        ]
        for layer in layers
    ]


def truth_of(targets: Targets) -> Truth:
    """Ground truth as the oracle reads it."""
    return [(label["class_labels"].tolist(), label["boxes"].double()) for label in targets.to_labels()]
