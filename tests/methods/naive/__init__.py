"""The papers' formulas, one query, one pair and one layer at a time: the oracle of the methods' tests.

Nothing here imports `hf_detrkd`.
"""

from __future__ import annotations

from tests.methods.naive.answers import (
    Layer,
    Truth,
    assign,
    class_divergence,
    giou,
    iou,
    kl,
    l1,
    soft_targets,
    taught_by,
)
from tests.methods.naive.clockdistill import bilinear, cells_of, clockdistill_memory, clockdistill_queries
from tests.methods.naive.detrdistill import (
    detrdistill_assignment,
    detrdistill_feature,
    detrdistill_logits,
    match_objects,
    pair_answers,
    pair_cost,
)
from tests.methods.naive.gates import better_answers, better_objects
from tests.methods.naive.points import kd_detr


__all__ = [
    "Layer",
    "Truth",
    "assign",
    "better_answers",
    "better_objects",
    "bilinear",
    "cells_of",
    "class_divergence",
    "clockdistill_memory",
    "clockdistill_queries",
    "detrdistill_assignment",
    "detrdistill_feature",
    "detrdistill_logits",
    "giou",
    "iou",
    "kd_detr",
    "kl",
    "l1",
    "match_objects",
    "pair_answers",
    "pair_cost",
    "soft_targets",
    "taught_by",
]
