"""Draws detections: one image with its boxes, or the detections of several models side by side."""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor


Color = str | tuple[int, int, int]
Frame = tuple[float, float, float, float]

# Bright and easy to tell apart, unlike skin, grass and sky.
PALETTE = (
    "#ff3b30",
    "#1f8fff",
    "#ffcc00",
    "#2bd95a",
    "#d146ff",
    "#ff8c1a",
    "#00d9d9",
    "#ff5cad",
    "#b4e600",
    "#7d66ff",
)


def class_colors(classes: Iterable[str]) -> dict[str, Color]:
    """One colour per class, the most different ones first; more than ten classes get hues in between.

    Args:
        classes (`Iterable[str]`): class names, in the order of the data set, so that all pictures of it agree.
    """
    return {name: PALETTE[i] if i < len(PALETTE) else _hue(i * 0.381966) for i, name in enumerate(classes)}


def draw_detections(
    image: Image.Image,
    boxes: Tensor | Sequence[Sequence[float]],
    labels: Sequence[str],
    scores: Tensor | Sequence[float] | None = None,
    color: Color | Mapping[str, Color] | None = None,
    min_side: int = 320,
) -> Image.Image:
    """Draws boxes with their class names, and scores where given; the best detections lie on top.

    Args:
        image (`PIL.Image.Image`): any mode and size; it is left as it is.
        boxes (`torch.Tensor` of shape `(num_boxes, 4)`): `(x_min, y_min, x_max, y_max)` in pixels of the image.
        labels (`list[str]`): class names.
        scores (`torch.Tensor` of shape `(num_boxes,)`, *optional*): in [0, 1], printed behind the names.
        color (*optional*): one colour, or one per class name, see [`class_colors`]. By default the name decides.
        min_side (`int`, *optional*, defaults to 320): an image whose longer side is shorter is enlarged to it, so that
            names stay readable on thumbnails.

    Returns:
        `PIL.Image.Image`: RGB.

    Raises:
        ValueError: boxes, labels and scores are not equally many.
    """
    corners = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    values = None if scores is None else torch.as_tensor(scores, dtype=torch.float32)
    counts = [len(corners), len(labels)] + ([] if values is None else [len(values)])
    if len(set(counts)) > 1:
        raise ValueError(f"boxes, labels and scores must be equally many, got {', '.join(map(str, counts))}")
    scale = max(1.0, min_side / max(image.size))
    canvas = image.convert("RGB").resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    font = _font(min(24, max(12, max(canvas.size) // 40)))
    draw, width = ImageDraw.Draw(canvas), max(3, max(canvas.size) // 200)
    order = range(len(labels)) if values is None else values.argsort(descending=True, stable=True).tolist()
    colors = [_color_of(label, color) for label in labels]
    frames = [_clipped(box, canvas.size) for box in (corners * scale).tolist()]
    for i in reversed(order):
        left, top, right, bottom = frames[i]
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="black")
        draw.rectangle(frames[i], outline=colors[i], width=width)
    texts = [name if values is None else f"{name} {values[i]:.2f}" for i, name in enumerate(labels)]
    spots: dict[int, Frame] = {}
    for i in order:
        spots[i] = _spot(frames[i], font.getlength(texts[i]) + 4, sum(font.getmetrics()), canvas.size, spots.values())
    for i in reversed(order):
        draw.rectangle(spots[i], fill=colors[i])
        draw.text((spots[i][0] + 2, spots[i][1]), texts[i], fill=_readable_on(colors[i]), font=font)
    return canvas


def comparison_grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """Puts pictures side by side under headings, one row per image.

    Args:
        rows (`list[list[PIL.Image.Image]]`): per image one picture for every title, as [`draw_detections`] makes them.
        titles (`list[str]`): headings of the columns, for example Truth, Teacher, Control, Distilled.

    Returns:
        `PIL.Image.Image`: RGB, on white.

    Raises:
        ValueError: there is no row, or a row has not as many pictures as there are titles.
    """
    counts = sorted({len(row) for row in rows})
    if counts != [len(titles)]:
        raise ValueError(f"each row must hold {len(titles)} pictures, one per title, got {counts or 'no row'}")
    gap, font = 8, _font(20)
    widths = [max([round(font.getlength(title)), *(row[i].width for row in rows)]) for i, title in enumerate(titles)]
    heights = [max(picture.height for picture in row) for row in rows]
    heading = sum(font.getmetrics()) + 2 * gap
    grid = Image.new("RGB", (sum(widths) + gap * (len(widths) + 1), heading + sum(heights) + gap * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    lefts = [gap + sum(widths[:i]) + gap * i for i in range(len(widths))]
    for left, width, title in zip(lefts, widths, titles, strict=True):
        draw.text((left + width / 2, heading / 2), title, fill="black", font=font, anchor="mm")
    top = heading
    for row, height in zip(rows, heights, strict=True):
        for left, width, picture in zip(lefts, widths, row, strict=True):
            grid.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
        top += height + gap
    return grid


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ImportError(
            "Pillow must come with FreeType to write readable names, got a build without: reinstall pillow."
        )
    return font


def _clipped(box: Sequence[float], size: tuple[int, int]) -> Frame:
    """The part of a box inside a picture, corners in order."""
    x0, x1 = sorted(min(max(x, 0), size[0] - 1) for x in box[0::2])
    y0, y1 = sorted(min(max(y, 0), size[1] - 1) for y in box[1::2])
    return x0, y0, x1, y1


def _spot(frame: Frame, wide: float, high: float, size: tuple[int, int], taken: Iterable[Frame]) -> Frame:
    """The first free place of a box's label: above, below or inside the box; above if all are taken."""
    x0, y0, x1, y1 = frame
    corners = [(x, y) for y in (y0 - high, y1, y0, y1 - high) for x in (x0, x1 - wide)]
    inside = [(max(0, min(x, size[0] - 1 - wide)), max(0, min(y, size[1] - 1 - high))) for x, y in corners]
    spots = [(x, y, x + wide, y + high) for x, y in inside]
    others = list(taken)
    return next((spot for spot in spots if not any(_overlap(spot, other) for other in others)), spots[0])


def _overlap(a: Frame, b: Frame) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _color_of(name: str, color: Color | Mapping[str, Color] | None) -> tuple[int, int, int]:
    chosen = color.get(name) if isinstance(color, Mapping) else color
    chosen = _hue(zlib.crc32(name.encode()) / 2**32) if chosen is None else chosen
    return ImageColor.getrgb(chosen)[:3] if isinstance(chosen, str) else chosen


def _hue(turn: float) -> tuple[int, int, int]:
    """A bright colour of this hue, in turns round the colour circle."""
    red, green, blue = colorsys.hls_to_rgb(turn % 1, 0.55, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def _readable_on(color: tuple[int, int, int]) -> str:
    red, green, blue = color
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "white"
