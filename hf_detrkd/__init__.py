"""Distillation of detection transformers with `transformers.Trainer`."""

from .adapters import ADAPTERS, DetectorAdapter
from .config import DistillationConfig
from .distiller import Distiller
from .evaluation import CocoBoxMetric
from .finishing import finish_run
from .methods import (
    KDDETR,
    METHODS,
    CLoCKDistill,
    CLoCKDistillConfig,
    DETRDistill,
    DETRDistillConfig,
    DistillationMethod,
    ExtraQueriesConfig,
    KDDETRConfig,
    TaskAdaptiveConfig,
    TaskAdaptiveRegularization,
)
from .models import (
    DinoDetrConfig,
    DinoDetrForObjectDetection,
    FasterRCNNConfig,
    FasterRCNNForObjectDetection,
)
from .outputs import DetectorOutput, ObjectQueries, Predictions
from .teacher import Teacher
from .trainer import DistillationTrainer


__version__ = "0.1.0"

__all__ = [
    "ADAPTERS",
    "KDDETR",
    "METHODS",
    "CLoCKDistill",
    "CLoCKDistillConfig",
    "CocoBoxMetric",
    "DETRDistill",
    "DETRDistillConfig",
    "DetectorAdapter",
    "DetectorOutput",
    "DinoDetrConfig",
    "DinoDetrForObjectDetection",
    "DistillationConfig",
    "DistillationMethod",
    "DistillationTrainer",
    "Distiller",
    "ExtraQueriesConfig",
    "FasterRCNNConfig",
    "FasterRCNNForObjectDetection",
    "KDDETRConfig",
    "ObjectQueries",
    "Predictions",
    "TaskAdaptiveConfig",
    "TaskAdaptiveRegularization",
    "Teacher",
    "finish_run",
]
