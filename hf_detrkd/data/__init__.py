"""Data sets, transforms and collation."""

from .augmentation import AugmentationConfig
from .collator import DetectionCollator
from .datasets import DetectionSplits, load_detection_split, load_detection_splits
from .detection import DetectionDataset
from .detection_stream import DetectionStream
from .errors import DatasetError, UnreadableImageError
from .image_size import parse_image_size
from .records import ImageRecord
from .stream import RowStream
from .streamed_splits import StreamedSplits, load_streamed_splits
from .transforms import DetectionTransform


__all__ = [
    "AugmentationConfig",
    "DatasetError",
    "DetectionCollator",
    "DetectionDataset",
    "DetectionSplits",
    "DetectionStream",
    "DetectionTransform",
    "ImageRecord",
    "RowStream",
    "StreamedSplits",
    "UnreadableImageError",
    "load_detection_split",
    "load_detection_splits",
    "load_streamed_splits",
    "parse_image_size",
]
