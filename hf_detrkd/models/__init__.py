"""Detectors that transformers lacks, under transformers' own names for everything: `AutoModelForObjectDetection`
builds and loads them as soon as this package is imported, and a saved model carries its code for everybody else."""

from transformers import AutoConfig, AutoModelForObjectDetection

from .dino_detr import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrModel
from .faster_rcnn import FasterRCNNConfig, FasterRCNNForObjectDetection


for _config, _model in (
    (DinoDetrConfig, DinoDetrForObjectDetection),
    (FasterRCNNConfig, FasterRCNNForObjectDetection),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForObjectDetection.register(_config, _model)
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForObjectDetection")


__all__ = [
    "DinoDetrConfig",
    "DinoDetrForObjectDetection",
    "DinoDetrModel",
    "FasterRCNNConfig",
    "FasterRCNNForObjectDetection",
]
