"""What a data set that cannot be used raises."""


class DatasetError(ValueError):
    """A data set cannot be used as it is; the message says what to correct."""


class UnreadableImageError(DatasetError):
    """An image file cannot be decoded; the message names it."""
