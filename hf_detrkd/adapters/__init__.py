"""One adapter per detector family. To add a family: one file and one line of [`ADAPTERS`]."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from ..structures.outputs import DetectorSpec
from .base import DetectorAdapter
from .conditional_detr import ConditionalDetrAdapter
from .d_fine import Deimv2Adapter, DFineAdapter
from .dab_detr import DabDetrAdapter
from .deformable_detr import DeformableDetrAdapter
from .detr import DetrAdapter, TableTransformerAdapter
from .dino_detr import DinoDetrAdapter
from .faster_rcnn import FasterRCNNAdapter
from .lw_detr import LwDetrAdapter, RfDetrAdapter
from .rt_detr import RTDetrAdapter
from .yolos import YolosAdapter


ADAPTERS: dict[str, type[DetectorAdapter]] = {
    "detr": DetrAdapter,
    "table-transformer": TableTransformerAdapter,
    "conditional_detr": ConditionalDetrAdapter,
    "dab-detr": DabDetrAdapter,
    "deformable_detr": DeformableDetrAdapter,
    "dino_detr": DinoDetrAdapter,
    "rt_detr": RTDetrAdapter,
    "rt_detr_v2": RTDetrAdapter,
    "d_fine": DFineAdapter,
    "deimv2": Deimv2Adapter,
    "lw_detr": LwDetrAdapter,
    "rf_detr": RfDetrAdapter,
    "faster_rcnn": FasterRCNNAdapter,
    "yolos": YolosAdapter,
}


def _adapter_class(config: PreTrainedConfig) -> type[DetectorAdapter]:
    if config.model_type not in ADAPTERS:
        known = ", ".join(sorted(ADAPTERS))
        raise ValueError(f"No adapter for model type {config.model_type!r}: choose a model of one of {known}.")
    return ADAPTERS[config.model_type]


def adapter_for(model: PreTrainedModel) -> DetectorAdapter:
    """Returns the adapter of a detector.

    Raises:
        ValueError: the model's family is not supported.
    """
    return _adapter_class(model.config)(model)


def spec_for(config: PreTrainedConfig) -> DetectorSpec:
    """Returns the static properties of a detector from its config."""
    return _adapter_class(config).supervised_spec_of(config)


def max_detections_of(config: PreTrainedConfig) -> int | None:
    """[`DetectorSpec.max_detections`], or `None` for a family without an adapter."""
    return spec_for(config).max_detections if config.model_type in ADAPTERS else None


def class_names(config: PreTrainedConfig) -> list[str]:
    """Returns a detector's class names in index order."""
    return [config.id2label[index] for index in range(config.num_labels)]


__all__ = ["ADAPTERS", "DetectorAdapter", "adapter_for", "class_names", "max_detections_of", "spec_for"]
