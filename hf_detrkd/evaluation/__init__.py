"""COCO box AP of detectors, streaming: inside training, and over several processes.

The path of a batch: [`detections_from_predictions`] and [`references_from_labels`] convert predictions and ground
truth to pixels of the original images, [`gatherable`] pads both into tensors that `Trainer` and `accelerate` can
gather and truncate, and [`CocoEvaluator`] passes them to [`CocoBoxMetric`], which keeps them in files until it
computes.
Boxes are `(x_min, y_min, x_max, y_max)` in pixels throughout, as from the image processors'
`post_process_object_detection`; only COCO's files and library use `(x, y, width, height)`.
"""

from typing import TYPE_CHECKING

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "detections": [
            "detections_from_predictions",
            "predictions_from_heads",
            "references_from_labels",
        ],
        "evaluator": ["CocoEvaluator", "PADDING", "gatherable"],
        "figures": ["FIGURES", "class_figures"],
        "metric": ["CocoBoxMetric"],
    },
)

if TYPE_CHECKING:
    from .detections import detections_from_predictions as detections_from_predictions
    from .detections import predictions_from_heads as predictions_from_heads
    from .detections import references_from_labels as references_from_labels
    from .evaluator import PADDING as PADDING
    from .evaluator import CocoEvaluator as CocoEvaluator
    from .evaluator import gatherable as gatherable
    from .figures import FIGURES as FIGURES
    from .figures import class_figures as class_figures
    from .metric import CocoBoxMetric as CocoBoxMetric
