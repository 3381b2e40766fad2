"""Reads image files: always RGB, always upright, with errors that name the file."""

from __future__ import annotations

import io
import struct
from os import PathLike

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .errors import UnreadableImageError


_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_SIDEWAYS = (5, 6, 7, 8)


def read_image(source: str | PathLike[str] | bytes, name: str) -> Image.Image:
    """Decodes an image as 8-bit RGB.

    The image is rotated by its EXIF orientation, as in viewers and labelling tools; boxes refer to the rotated image.
    Only the upper 8 bits of 16-bit images are used. Transparency is dropped.

    Args:
        source (`str`, `os.PathLike` or `bytes`): path or content of the file.
        name (`str`): its name in error messages.

    Raises:
        `UnreadableImageError`: if it cannot be decoded, or has pixels of no known range.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright)
    except _DECODING_ERRORS as error:
        raise UnreadableImageError(
            f"The image {name} cannot be read ({error}): repair or remove it, or set `skip_unreadable_images`."
        ) from error


def read_size(source: str | PathLike[str] | bytes) -> tuple[int, int]:
    """(width, height) of the upright image from its file header, (0, 0) if that cannot be read."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            # The base class's method: PNG's own decodes the image to find a chunk after the pixels.
            sideways = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in _SIDEWAYS
            return (image.height, image.width) if sideways else image.size
    except _DECODING_ERRORS:
        return 0, 0


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers of no known range")
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(np.clip(deep, 0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("RGB")
