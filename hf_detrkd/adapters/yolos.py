"""YOLOS: a plain ViT whose last tokens are the detections. It has no decoder for external queries."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig

from ..losses.criterion import Answers, DetectionCriterion, ModelCriterion
from ..structures.outputs import DetectorOutput, DetectorSpec, FeatureMap, ObjectQueries, Predictions
from ..structures.targets import Targets
from .base import DetectorAdapter
from .detr import DetrAdapter


class YolosAdapter(DetectorAdapter):
    """Adapter of `YolosForObjectDetection` (Fang et al., https://arxiv.org/abs/2106.00666).

    It returns the predictions of the last layer (the only one that its heads are trained for) and its patch tokens as
    feature maps. External queries raise an error: they would need another pass through the whole ViT.
    """

    uses_pixel_mask: ClassVar[bool] = False
    backbone_prefix: str = "vit."

    @staticmethod
    def spec_of(config: PreTrainedConfig) -> DetectorSpec:
        return DetectorSpec(
            family=config.model_type,
            query_fields=frozenset(),
            width=config.hidden_size,
            num_layers=1,
            num_queries=config.num_detection_tokens,
            num_classes=config.num_labels,
            activation="softmax",
            features={"neck": (config.hidden_size,), "encoder": (config.hidden_size,)},
        )

    @staticmethod
    def criterion_of(config: PreTrainedConfig) -> DetectionCriterion:
        return DetrAdapter.criterion_of(config)

    def encode(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, targets: Targets | None = None
    ) -> tuple[DetectorOutput, Answers | None]:
        self.refuse_mask(pixel_mask)
        vit, patches = self.model.vit, []
        projection = vit.embeddings.patch_embeddings.projection
        handles = [projection.register_forward_hook(lambda _, args, output: patches.append(output))]
        tokens: list[Tensor] = []
        handles.append(vit.register_forward_hook(lambda _, args, output: tokens.append(output.last_hidden_state)))
        losses = None
        try:
            if targets is not None and isinstance(self.criterion, ModelCriterion):
                losses = {"transformers": self.model(pixel_values, labels=targets.to_labels()).loss}
            else:
                vit(pixel_values)
        finally:
            for handle in handles:
                handle.remove()
        split = self.spec.num_queries
        states, shape = tokens[0][:, -split:], patches[0].shape[-2:]
        layer = Predictions(
            self.model.class_labels_classifier(states),
            self.model.bbox_predictor(states).float().sigmoid(),
            states,
            "softmax",
        )
        memory = tokens[0][:, 1:-split].mT.unflatten(-1, tuple(shape))  # (batch_size, hidden_size, height, width)
        output = DetectorOutput(
            layers=(layer,),
            queries=ObjectQueries(),
            features={"neck": (FeatureMap(patches[0]),), "encoder": (FeatureMap(memory),)},
            decode=self._refuse,
        )
        return output, None if targets is None else Answers((layer,), model_losses=losses)

    def _refuse(self, queries: ObjectQueries) -> Any:
        raise ValueError("yolos cannot decode external queries: it has no decoder besides its backbone.")
