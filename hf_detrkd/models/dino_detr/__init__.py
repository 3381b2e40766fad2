"""DINO (Zhang et al., https://arxiv.org/abs/2203.03605) as a transformers model."""

from typing import TYPE_CHECKING

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "configuration_dino_detr": ["DinoDetrConfig"],
        "modeling_dino_detr": ["DinoDetrForObjectDetection", "DinoDetrModel"],
    },
)

if TYPE_CHECKING:
    from .configuration_dino_detr import DinoDetrConfig as DinoDetrConfig
    from .modeling_dino_detr import DinoDetrForObjectDetection as DinoDetrForObjectDetection
    from .modeling_dino_detr import DinoDetrModel as DinoDetrModel
