"""One file per distillation method. To add a method: one file and one line of [`METHODS`]."""

from __future__ import annotations

from .base import DistillationMethod, Paper
from .clockdistill import CLoCKDistill, CLoCKDistillConfig
from .detrdistill import DETRDistill, DETRDistillConfig
from .extra_queries import ExtraQueries, ExtraQueriesConfig
from .kd_detr import KDDETR, KDDETRConfig
from .task_adaptive import TaskAdaptiveConfig, TaskAdaptiveRegularization


METHODS: dict[str, type[DistillationMethod]] = {
    "clockdistill": CLoCKDistill,
    "detrdistill": DETRDistill,
    "extra_queries": ExtraQueries,
    "kd_detr": KDDETR,
    "task_adaptive": TaskAdaptiveRegularization,
}

__all__ = [
    "KDDETR",
    "METHODS",
    "CLoCKDistill",
    "CLoCKDistillConfig",
    "DETRDistill",
    "DETRDistillConfig",
    "DistillationMethod",
    "ExtraQueries",
    "ExtraQueriesConfig",
    "KDDETRConfig",
    "Paper",
    "TaskAdaptiveConfig",
    "TaskAdaptiveRegularization",
]
