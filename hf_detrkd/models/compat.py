"""Differences between the supported versions of transformers, each with the version that made it.

DINO's own ones are in its file, which saved models carry.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING


FAMILY_SINCE = {"dino_detr": (5, 4), "deimv2": (5, 7), "rf_detr": (5, 9)}
"""Families that need a later version than the oldest supported one."""


def is_missing(model_type: str) -> bool:
    """True for a supported family that does not work with the installed transformers."""
    installed = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return installed < FAMILY_SINCE.get(model_type, (0, 0))


def check_family(model_type: str) -> None:
    """
    Raises:
        ValueError: the installed transformers lacks this family.
    """
    if is_missing(model_type):
        since = ".".join(map(str, FAMILY_SINCE[model_type]))
        raise ValueError(
            f"{model_type} needs transformers>={since}, but {transformers.__version__} is installed: upgrade "
            "transformers, or choose a model of another family."
        )


def processor_class(config: type[PreTrainedConfig]) -> Any:
    """The image processor class of a family, the one that uses torchvision."""
    classes = IMAGE_PROCESSOR_MAPPING[config]
    return classes["torchvision"] if isinstance(classes, dict) else classes[1]  # 5.4: they were (slow, fast)


def class_loss_weight(config: PreTrainedConfig) -> float:
    """The weight of LW-DETR's classification loss."""
    return getattr(config, "class_loss_coefficient", 1.0)  # 5.9: it was always 1
