"""Reads image files: always RGB, always upright, with errors that name the file."""

from __future__ import annotations

import io
import os
import struct
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .errors import UnreadableImageError
from .text import IS_POINTER, is_lfs_pointer


_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_SIDEWAYS = (5, 6, 7, 8)


PIXELS = "HF_DETRKD_MAX_IMAGE_PIXELS"  # for the loader's processes
DEPTHS = (8, 10, 12, 14, 16)  # bits of a grey level


IMAGES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())


def allow_pixels(count: int) -> None:
    """Sets the number of pixels of the largest image that is read, here and in processes started from here."""
    os.environ[PIXELS] = str(count)
    Image.MAX_IMAGE_PIXELS = -(-count // 2)  # Pillow refuses twice as many


if os.environ.get(PIXELS, "").isdecimal():
    allow_pixels(int(os.environ[PIXELS]))


def read_image(source: str | PathLike[str] | bytes, name: str) -> Image.Image:
    """Decodes an image as 8-bit RGB.

    The image is rotated by its EXIF orientation, as in viewers and labelling tools; boxes refer to the rotated image.
    Deeper grey levels keep the upper 8 of as many bits as the image uses, 8, 10, 12, 14 or 16. Transparency is
    dropped.

    Args:
        source (`str`, `os.PathLike` or `bytes`): path or content of the file.
        name (`str`): its name in error messages.

    Raises:
        `UnreadableImageError`: if it cannot be decoded, or has pixels of no known range.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            ImageOps.exif_transpose(image, in_place=True)  # without a copy of what is upright
            return _to_rgb(image)
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(
            f"The image {name} is too large ({error}): set --max_image_pixels, or make it smaller."
        ) from error
    except _DECODING_ERRORS as error:
        if _is_pointer(source):
            raise UnreadableImageError(f"The image {name} {IS_POINTER}.") from error
        raise UnreadableImageError(
            f"The image {name} cannot be read ({error}): repair or remove it, or set `--skip_unreadable_images`."
        ) from error


def _is_pointer(source: str | PathLike[str] | bytes) -> bool:
    if isinstance(source, bytes):
        return is_lfs_pointer(source)
    try:
        with open(source, "rb") as file:
            return is_lfs_pointer(file.read(100))
    except OSError:
        return False


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
        deep = np.asarray(image)  # of 16 or 32 bits: a wider copy of a scan would take gigabytes
        bits = next((depth for depth in DEPTHS if deep.max(initial=0) < 2**depth), DEPTHS[-1])
        image = Image.fromarray(np.clip(deep >> (bits - 8), 0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")
