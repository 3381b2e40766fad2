"""What is wrong with a data set and a teacher, before a run: found in the boxes alone, and in the teacher's answers.

A teacher that knows its trade is a witness: where its boxes fit the truth only once that is moved, the truth is in
another frame; where its names fit only once they are exchanged, the classes are in another order; where it sees better
through another preprocessing, its image processor is wrong. Each check asks for far better, not for better.
"""

from .annotations import Statistics, offered_splits, repair_fault
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
    "repair_fault",
    "with_renamed",
]
