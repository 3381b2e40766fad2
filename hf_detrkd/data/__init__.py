"""Data sets, transforms and collation."""

from .augmentation import AugmentationConfig
from .collator import DetectionCollator
from .datasets import DetectionSplits, load_detection_split, load_detection_splits
from .detection import DetectionDataset
from .errors import DatasetError, UnreadableImageError
from .image_size import parse_image_size
from .records import ImageRecord
from .transforms import DetectionTransform


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
