"""DINO (Zhang et al., https://arxiv.org/abs/2203.03605) as a transformers model."""

from .configuration_dino_detr import DinoDetrConfig
from .modeling_dino_detr import DinoDetrForObjectDetection, DinoDetrModel


__all__ = ["DinoDetrConfig", "DinoDetrForObjectDetection", "DinoDetrModel"]
