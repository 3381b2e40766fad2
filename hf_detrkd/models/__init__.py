"""Detectors that transformers lacks: DINO and Faster R-CNN.

After `import hf_detrkd`, `AutoModelForObjectDetection` builds and loads them. Saved models include their code, so that
they also load without this package (`trust_remote_code=True`).
"""

from typing import TYPE_CHECKING

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dino_detr": ["DinoDetrConfig", "DinoDetrForObjectDetection", "DinoDetrModel"],
        "faster_rcnn": ["FasterRCNNConfig", "FasterRCNNForObjectDetection"],
    },
)

if TYPE_CHECKING:
    from .dino_detr import DinoDetrConfig as DinoDetrConfig
    from .dino_detr import DinoDetrForObjectDetection as DinoDetrForObjectDetection
    from .dino_detr import DinoDetrModel as DinoDetrModel
    from .faster_rcnn import FasterRCNNConfig as FasterRCNNConfig
    from .faster_rcnn import FasterRCNNForObjectDetection as FasterRCNNForObjectDetection
