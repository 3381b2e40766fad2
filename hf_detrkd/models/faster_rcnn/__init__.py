"""Faster R-CNN (Ren et al., https://arxiv.org/abs/1506.01497) of torchvision as a transformers model."""

from .configuration_faster_rcnn import FasterRCNNConfig
from .modeling_faster_rcnn import FasterRCNNForObjectDetection, FasterRCNNOutput


__all__ = ["FasterRCNNConfig", "FasterRCNNForObjectDetection", "FasterRCNNOutput"]
