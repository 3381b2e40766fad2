"""Errors of data sets and images that cannot be used."""


class DatasetError(ValueError):
    """A data set cannot be used as it is; the message says what to correct."""


class UnreadableImageError(DatasetError):
    """An image file cannot be decoded; the message names it."""
