"""One file per distillation method. To add a method: one file and one line of [`METHODS`]."""

from __future__ import annotations

from .base import DistillationMethod, Paper
from .detrdistill import DETRDistill, DETRDistillConfig
from .kd_detr import KDDETR, KDDETRConfig


METHODS: dict[str, type[DistillationMethod]] = {
    "detrdistill": DETRDistill,
    "kd_detr": KDDETR,
}

__all__ = ["KDDETR", "METHODS", "DETRDistill", "DETRDistillConfig", "DistillationMethod", "KDDETRConfig", "Paper"]
