"""COCO box AP of detectors, streaming: inside training, and over several processes.

The road of a batch: [`detections_from_predictions`] and [`references_from_labels`] bring answers and truth into pixels
of the original images, [`gatherable`] pads both into tensors that `Trainer` and `accelerate` gather and truncate as
they are, and [`CocoEvaluator`] hands them to [`CocoBoxMetric`], which keeps them in an Arrow file until it computes.
Boxes are `(x_min, y_min, x_max, y_max)` in pixels all the way, as the image processors'
`post_process_object_detection` gives them; only COCO's files and library see `(x, y, width, height)`.
"""

from .detections import MAX_DETECTIONS, detections_from_predictions, predictions_from_heads, references_from_labels
from .evaluator import PADDING, CocoEvaluator, gatherable
from .metric import FIGURES, CocoBoxMetric, class_figures


__all__ = [
    "FIGURES",
    "MAX_DETECTIONS",
    "PADDING",
    "CocoBoxMetric",
    "CocoEvaluator",
    "class_figures",
    "detections_from_predictions",
    "gatherable",
    "predictions_from_heads",
    "references_from_labels",
]
