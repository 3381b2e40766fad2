"""Target size of images, from an image processor or the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


KEYS = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"})
LARGEST = 2**14  # pixels of a side


@dataclass(frozen=True)
class ImageSize:
    """A fixed `height` and `width`; or the `shortest_edge`, and the maximum of the `longest_edge`; or the maximum of
    height and width. In pixels, rounded as image processors of transformers do.

    Attributes:
        multiple (`int`): sides that keep the aspect ratio are rounded down to multiples of this.
    """

    height: int = 0
    width: int = 0
    shortest_edge: int | None = None
    longest_edge: int | None = None
    max_height: int | None = None
    max_width: int | None = None
    multiple: int | None = None

    @classmethod
    def parse(cls, size: tuple[int, int] | Mapping[str, int], multiple: int | None = None) -> ImageSize:
        """From (height, width), or from an image processor's `size`.

        Raises:
            `ValueError`: if it is neither of these, or not positive.
        """
        if not isinstance(size, Mapping):
            size = dict(zip(("height", "width"), (int(side) for side in size), strict=True))
        size = {name: side for name, side in size.items() if side is not None}
        if set(size) in KEYS and all(type(side) is int and 0 < side <= LARGEST for side in size.values()):
            return cls(**size, multiple=multiple)
        raise ValueError(
            "`size` must be (height, width), or have the keys height and width, or shortest_edge and optionally "
            f"longest_edge, or max_height and max_width, all "
            f"positive whole numbers up to {LARGEST}, got {dict(size)!r:.120}: set --image_size."
        )

    @property
    def keeps_ratio(self) -> bool:
        """True if images keep their aspect ratio."""
        return not self.height

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Target (height, width) of an image of a given size."""
        if not self.keeps_ratio:
            return self.height, self.width
        if self.max_height is not None and self.max_width is not None:
            scale = min(self.max_height / height, self.max_width / width)
            sides = (int(height * scale), int(width * scale))
        else:
            sides = self._by_edges(height, width)
        multiple = self.multiple or 1
        first, second = (max(side - side % multiple, multiple) for side in sides)
        return first, second

    def _by_edges(self, height: int, width: int) -> tuple[int, int]:
        """The shorter side rounded, and the longer one cut off, as in DETR."""
        short, long = min(height, width), max(height, width)
        wanted = float(self.shortest_edge or 0)
        if self.longest_edge is not None and long / short * wanted > self.longest_edge:
            wanted = self.longest_edge * short / long
        least = round(wanted)
        most = long if least == short else int(wanted * long / short)
        return (least, most) if height <= width else (most, least)


def parse_image_size(text: str | None, argument: str = "image_size") -> tuple[int, int] | None:
    """Height and width in pixels from the `argument` `128` or `320x256` of a command line; `None` stays `None`.

    Raises:
        `ValueError`: if it is neither a number nor HEIGHTxWIDTH.
    """
    if text is None:
        return None
    numbers = str(text).lower().split("x")
    if len(numbers) > 2 or not all(_is_side(number) for number in numbers):
        raise ValueError(f"--{argument} must be a number or HEIGHTxWIDTH, up to {LARGEST} pixels, got {text!r:.80}.")
    return int(numbers[0]), int(numbers[-1])


def plain_image_size(text: str | None, argument: str = "image_size") -> str | None:
    """The one spelling HEIGHTxWIDTH of what [`parse_image_size`] takes."""
    size = parse_image_size(text, argument)
    return None if size is None else f"{size[0]}x{size[1]}"


def _is_side(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= len(str(LARGEST)) and 0 < int(text) <= LARGEST
