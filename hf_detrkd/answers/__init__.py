"""Stored answers of a teacher: what it predicted for each image, written once and read in training."""

from .columns import STORED, as_columns, as_output, rows_of
from .manifest import Manifest, first_difference
from .reader import StoredAnswers
from .writer import AnswerWriter


__all__ = [
    "STORED",
    "AnswerWriter",
    "Manifest",
    "StoredAnswers",
    "as_columns",
    "as_output",
    "first_difference",
    "rows_of",
]
