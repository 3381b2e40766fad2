"""Finds problems of a data set and a teacher before a run, from the boxes and from the teacher's predictions.

A trained teacher is used to detect annotation errors: if its boxes match the ground truth only after a transform, the
box format is wrong; if its classes match only after a permutation, the class order is wrong; if it is much better with
another preprocessing, its image processor is wrong. Each check requires a large difference.
"""

from .annotations import Statistics, offered_splits
from .box_frames import better_frame, reframed
from .class_order import confusion, renamed, with_renamed
from .memory import GIB, PeakMemory, fitting_batch, memory_of
from .teacher_views import NORMALIZATIONS, Seen, View, look, map_of


__all__ = [
    "GIB",
    "NORMALIZATIONS",
    "PeakMemory",
    "Seen",
    "Statistics",
    "View",
    "better_frame",
    "confusion",
    "fitting_batch",
    "look",
    "map_of",
    "memory_of",
    "offered_splits",
    "reframed",
    "renamed",
    "with_renamed",
]
