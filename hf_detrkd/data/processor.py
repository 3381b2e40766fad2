"""What an image processor of transformers does to an image, as far as training, evaluation and prediction share it."""

from __future__ import annotations

from typing import Any, TypeAlias

from .checks import is_finite
from .image_size import ImageSize


Normalization: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation by channel, of pixels in [0, 1]."""

NO_NORMALIZATION: Normalization = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
MULTIPLES = {"YolosImageProcessor": 16, "YolosImageProcessorFast": 16, "YolosImageProcessorPil": 16}
"""What the sides of an image become multiples of, by the class of the processor."""


def normalization_of(processor: Any) -> Normalization:
    """Normalisation that an image processor applies, in terms of pixels in [0, 1]: its rescaling of bytes, if it is
    another one than by 1 / 255, is part of it.

    Raises:
        ValueError: it has other numbers than three for the channels, or would divide by zero.
    """
    means, deviations = NO_NORMALIZATION
    if processor.do_normalize:
        means, deviations = (_channels(getattr(processor, name, None), name) for name in ("image_mean", "image_std"))
    rescales = getattr(processor, "do_rescale", True) is not False
    factor = getattr(processor, "rescale_factor", None) or 1 / 255
    if not is_finite(factor) or not 1e-6 <= factor <= 1e3 or not all(1e-6 <= abs(one) <= 1e6 for one in deviations):
        raise ValueError(
            f"The image processor would make pixels that are no sound numbers: its rescale_factor is {factor!r:.60}, "
            f"and its image_std {list(deviations)}."
        )
    whole = 255 * factor if rescales else 255.0  # a white pixel
    if abs(whole - 1) < 1e-6:
        return means, deviations
    return tuple(value / whole for value in means), tuple(value / whole for value in deviations)


def _channels(values: Any, name: str) -> tuple[float, ...]:
    """Three finite numbers, of a list or of one number for all channels."""
    found = [values] * 3 if is_finite(values) else values
    if (
        not isinstance(found, list | tuple)
        or len(found) != 3
        or not all(is_finite(one) and abs(one) <= 1e6 for one in found)
    ):
        raise ValueError(f"The {name} of the image processor must be three numbers, got {values!r:.80}.")
    return tuple(map(float, found))


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
    try:
        size = dict(processor.size)
    except (TypeError, ValueError):
        size = {"size": processor.size}
    return ImageSize.parse(size, MULTIPLES.get(type(processor).__name__))
