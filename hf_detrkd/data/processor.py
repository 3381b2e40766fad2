"""What an image processor of transformers does to an image, as far as training, evaluation and prediction share it."""

from __future__ import annotations

from typing import Any, TypeAlias

from .image_size import ImageSize


Normalization: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation by channel, of pixels in [0, 1]."""

NO_NORMALIZATION: Normalization = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
MULTIPLES = {"YolosImageProcessor": 16, "YolosImageProcessorFast": 16, "YolosImageProcessorPil": 16}
"""What the sides of an image become multiples of, by the class of the processor."""


def normalization_of(processor: Any) -> Normalization:
    """Normalisation that an image processor applies, in terms of pixels in [0, 1]: its rescaling of bytes, if it is
    another one than by 1 / 255, is part of it."""
    means, deviations = NO_NORMALIZATION
    if processor.do_normalize:
        means, deviations = tuple(processor.image_mean), tuple(processor.image_std)
    rescales = getattr(processor, "do_rescale", True) is not False
    whole = 255 * (getattr(processor, "rescale_factor", None) or 1 / 255) if rescales else 255.0  # a white pixel
    if abs(whole - 1) < 1e-6:
        return means, deviations
    return tuple(value / whole for value in means), tuple(value / whole for value in deviations)


def size_of(processor: Any) -> ImageSize:
    """The size that an image processor gives images.

    Raises:
        ValueError: it leaves images at their own size, or has a `size` of another kind.
    """
    if getattr(processor, "do_resize", True) is False:
        raise ValueError(
            "The image processor leaves images at their own size (do_resize is false), in which they cannot be "
            "batched: set --image_size."
        )
    return ImageSize.parse(dict(processor.size), MULTIPLES.get(type(processor).__name__))
