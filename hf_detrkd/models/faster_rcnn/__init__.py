"""torchvision's Faster R-CNN (Ren et al., https://arxiv.org/abs/1506.01497) as a transformers model."""

from typing import TYPE_CHECKING

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "configuration_faster_rcnn": ["FasterRCNNConfig"],
        "modeling_faster_rcnn": ["FasterRCNNForObjectDetection", "FasterRCNNOutput"],
    },
)

if TYPE_CHECKING:
    from .configuration_faster_rcnn import FasterRCNNConfig as FasterRCNNConfig
    from .modeling_faster_rcnn import FasterRCNNForObjectDetection as FasterRCNNForObjectDetection
    from .modeling_faster_rcnn import FasterRCNNOutput as FasterRCNNOutput
