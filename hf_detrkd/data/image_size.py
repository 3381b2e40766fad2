"""Target size of images, from an image processor or the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSize:
    """A fixed `height` and `width`, or the `shortest_edge` (and the maximum of the `longest_edge`), in pixels."""

    height: int = 0
    width: int = 0
    shortest_edge: int | None = None
    longest_edge: int | None = None

    @classmethod
    def parse(cls, size: tuple[int, int] | Mapping[str, int]) -> ImageSize:
        """From (height, width), or from an image processor's `size`.

        Raises:
            `ValueError`: if it is neither of these, or not positive.
        """
        if not isinstance(size, Mapping):
            size = dict(zip(("height", "width"), size, strict=True))
        if set(size) == {"height", "width"} and min(size.values()) > 0:
            return cls(size["height"], size["width"])
        if set(size) in ({"shortest_edge"}, {"shortest_edge", "longest_edge"}) and min(size.values()) > 0:
            return cls(shortest_edge=size["shortest_edge"], longest_edge=size.get("longest_edge"))
        raise ValueError(
            f"`size` must be (height, width), or have the keys height and width, or shortest_edge and optionally "
            f"longest_edge, all positive, got {dict(size)}."
        )

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Target (height, width) of an image of a given size."""
        if self.shortest_edge is None:
            return self.height, self.width
        scale = self.shortest_edge / min(height, width)
        if self.longest_edge is not None:
            scale = min(scale, self.longest_edge / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))


def parse_image_size(text: str | None, argument: str = "image_size") -> tuple[int, int] | None:
    """Height and width in pixels from the `argument` `128` or `320x256` of a command line; `None` stays `None`.

    Raises:
        `ValueError`: if it is neither a number nor HEIGHTxWIDTH.
    """
    if text is None:
        return None
    numbers = str(text).lower().split("x")
    if len(numbers) > 2 or not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise ValueError(f"--{argument} must be a number or HEIGHTxWIDTH, got {text!r}.")
    return int(numbers[0]), int(numbers[-1])
