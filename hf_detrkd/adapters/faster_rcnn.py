"""Faster R-CNN: queries are boxes, which the box head predicts independently."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import clip_boxes_to_image
from transformers import PreTrainedConfig

from ..losses.criterion import Answers, ModelCriterion
from ..models.faster_rcnn.modeling_faster_rcnn import Answer, Encoded, Samples, to_pixels, to_unit
from ..structures.outputs import (
    WHOLE_IMAGE,
    DetectorOutput,
    DetectorSpec,
    FeatureMap,
    ObjectQueries,
    Predictions,
    Proposals,
)
from ..structures.targets import Targets
from .base import DetectorAdapter


class FasterRCNNAdapter(DetectorAdapter):
    """Adapter of [`~hf_detrkd.models.FasterRCNNForObjectDetection`] (Ren et al., https://arxiv.org/abs/1506.01497).

    A query is a box without gradient: the head pools the feature pyramid there and predicts class and box. The own
    queries are the boxes sampled for the loss in training with targets, otherwise the detections, filled up with the
    best proposals. Duplicates are removed only in `detections`. The loss is torchvision's.
    """

    processor_type = "detr"
    backbone_prefix = "backbone.body."
    background_first = True
    frozen_stages = 2
    full_precision = frozenset({"rpn"})

    @staticmethod
    def spec_of(config: PreTrainedConfig) -> DetectorSpec:
        return DetectorSpec(
            family=config.model_type,
            query_fields=frozenset({"boxes"}),
            width=config.hidden_size,
            num_layers=1,
            num_queries=config.num_detections,
            num_classes=config.num_labels,
            activation="softmax",
            features={"neck": config.level_widths, "encoder": config.level_widths},
            one_to_one=False,
        )

    @staticmethod
    def criterion_of(config: PreTrainedConfig) -> ModelCriterion:
        return ModelCriterion()

    def encode(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, targets: Targets | None = None
    ) -> tuple[DetectorOutput, Answers | None]:
        """See [`DetectorAdapter.encode`]. In eval mode the sampling of the loss leaves the global random state
        unchanged."""
        encoded = self.model.encode(pixel_values, pixel_mask)
        if targets is None:
            return self._detected(encoded), None
        devices = [pixel_values.device] if pixel_values.device.type == "cuda" else []
        with nullcontext() if self.model.training else torch.random.fork_rng(devices):
            losses, samples = self.model.learn(encoded, targets.to_labels())
        output = self._sampled(encoded, samples) if self.model.training else self._detected(encoded)
        return output, Answers(output.layers, model_losses=losses)

    def _sampled(self, encoded: Encoded, samples: Samples) -> DetectorOutput:
        """Output for the boxes that the loss is computed on."""
        boxes, matched = (
            padded([to_unit(one, size) for one, size in zip(per_image, encoded.sizes, strict=True)])
            for per_image in (samples.boxes, samples.matched)
        )
        labels = padded([one - 1 for one in samples.labels], -1)
        valid = padded([torch.ones_like(one, dtype=torch.bool) for one in samples.labels])
        added = padded(
            [
                (b == m).all(-1) & (c > 0)
                for b, m, c in zip(samples.boxes, samples.matched, samples.labels, strict=True)
            ]
        )
        answers = self._predictions(samples.answer, samples.boxes, encoded.sizes)
        proposals = Proposals(boxes, labels, matched, valid, added)
        return self._output(encoded, answers, ObjectQueries(boxes=boxes), proposals=proposals)

    def _detected(self, encoded: Encoded) -> DetectorOutput:
        """Output for the detections: the boxes after NMS, and the head's predictions at these boxes."""
        with torch.no_grad():
            proposals, _ = self.model.propose(encoded)
        logits, boxes = self.model.detect(encoded, proposals)
        detections = Predictions(logits, boxes, None, "softmax")
        found = detections.scores().amax(-1, keepdim=True) > 0
        places = torch.where(found, boxes, self._first(proposals, encoded)).detach()
        queries = ObjectQueries(boxes=places)
        return self._output(encoded, self._ask(encoded, queries)[0], queries, detections=detections)

    def _first(self, proposals: list[Tensor], encoded: Encoded) -> Tensor:
        """The best proposals, as many as there are detections, `(batch_size, num_detections, 4)`."""
        count = self.spec.num_queries
        rows = []
        for boxes, size in zip(proposals, encoded.sizes, strict=True):
            filling = boxes.new_tensor(WHOLE_IMAGE).expand(max(0, count - len(boxes)), -1)
            rows.append(torch.cat([to_unit(boxes[:count], size), filling]))
        return torch.stack(rows)

    def _output(self, encoded: Encoded, answers: Predictions, queries: ObjectQueries, **more: Any) -> DetectorOutput:
        maps = self._pyramid(encoded)
        decode = partial(self._ask, encoded)
        return DetectorOutput((answers,), queries, {"neck": maps, "encoder": maps}, decode, **more)

    def _ask(self, encoded: Encoded, queries: ObjectQueries) -> tuple[Predictions, ...]:
        """Predictions for boxes; boxes get no gradient and do not influence each other."""
        given = self.needed(queries, "boxes").detach().float()
        boxes = [
            clip_boxes_to_image(to_pixels(one, size), size) for one, size in zip(given, encoded.sizes, strict=True)
        ]
        with self._normalized_alone():
            answer = self.model.answer(encoded, boxes)
        return (self._predictions(answer, boxes, encoded.sizes),)

    @contextmanager
    def _normalized_alone(self) -> Iterator[None]:
        """Sets the head's BatchNorm to eval mode: it would mix the boxes of a batch and update its statistics."""
        norms = [m for m in self.model.roi_heads.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
        for norm in norms:
            norm.eval()
        try:
            yield
        finally:
            for norm in norms:
                norm.train()

    def _predictions(self, answer: Answer, boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Predictions:
        """The head's predictions per image, with background as the last class."""
        counts = [len(one) for one in boxes]
        logits = padded(answer.logits.roll(-1, -1).split(counts))
        moved = self.model.boxes_of(answer, boxes, sizes)
        class_boxes = padded([to_unit(one, size) for one, size in zip(moved, sizes, strict=True)])
        states = padded(answer.states.split(counts))
        answers = Predictions(logits, class_boxes[:, :, 0], states, "softmax", class_boxes=class_boxes)
        return replace(answers, boxes=answers.boxes_of(logits[..., :-1].argmax(-1)))

    def _pyramid(self, encoded: Encoded) -> tuple[FeatureMap, ...]:
        """The pyramid levels that boxes are pooled from."""
        names = self.model.roi_heads.box_roi_pool.featmap_names
        values = [encoded.pyramid[name] for name in names if name in encoded.pyramid]
        height, width = encoded.images.tensors.shape[-2:]
        if all(size == (height, width) for size in encoded.sizes):
            return tuple(FeatureMap(value) for value in values)
        real = torch.zeros(len(encoded.sizes), 1, height, width, device=values[0].device)
        for row, (own_height, own_width) in enumerate(encoded.sizes):
            real[row, :, :own_height, :own_width] = 1
        return tuple(FeatureMap(v, F.interpolate(real, v.shape[-2:])[:, 0] < 0.5) for v in values)


def padded(rows: Any, value: float = 0.0) -> Tensor:
    """Stacks tensors of several images, padded to the longest."""
    return pad_sequence(list(rows), batch_first=True, padding_value=value)
