"""Data sets, transforms and batches."""

from .collator import DetectionCollator
from .datasets import DetectionSplits, load_detection_split, load_detection_splits
from .detection import DetectionDataset
from .errors import DatasetError, UnreadableImageError
from .records import ImageRecord
from .transforms import AugmentationConfig, DetectionTransform, parse_image_size


__all__ = [
    "AugmentationConfig",
    "DatasetError",
    "DetectionCollator",
    "DetectionDataset",
    "DetectionSplits",
    "DetectionTransform",
    "ImageRecord",
    "UnreadableImageError",
    "load_detection_split",
    "load_detection_splits",
    "parse_image_size",
]
