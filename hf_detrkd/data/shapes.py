"""The generated data set `shapes`: six classes of drawn objects on textured backgrounds, without a download.

Every image is a function of (seed, split, index) alone and is drawn when it is read. The scene (which objects, where)
is drawn up apart from the pixels, so annotations are known without rendering.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
from PIL import Image, ImageDraw

from .records import ImageRecord, Records


SHAPE_CLASSES = ["disc", "box", "triangle", "cross", "ring", "diamond"]
SHAPES_SIZES = {"train": 2000, "validation": 300, "test": 300}

MIN_VISIBLE = 0.6
CACHE_BYTES = 200 * 2**20
_RADIAL = (SHAPE_CLASSES.index("disc"), SHAPE_CLASSES.index("ring"))
_HALF_TURN = {"box": 15.0, "triangle": 180.0, "cross": 20.0, "diamond": 15.0}
_GRID = np.stack(np.meshgrid(*[(np.arange(8) + 0.5) / 8] * 2), -1).reshape(-1, 2)


@dataclass(frozen=True)
class Shape:
    """An object of a scene: `box` is (x0, y0, x1, y1) in pixels, `parts` the convex polygons of which it is the union,
    each a list of half-planes (normal x, normal y, offset); a disc and a ring have none."""

    category: int
    box: tuple[float, float, float, float]
    color: tuple[float, float, float]
    parts: tuple[list[tuple[float, float, float]], ...] = ()

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Signed distance of points to the outline in pixels, negative inside, exact near the edges."""
        if not self.parts:
            x0, y0, x1, y1 = self.box
            radius = (x1 - x0) / 2
            from_center = np.hypot(x - (x0 + x1) / 2, y - (y0 + y1) / 2)
            if SHAPE_CLASSES[self.category] == "disc":
                return from_center - radius
            return np.abs(from_center - 0.74 * radius) - 0.26 * radius
        distances = []
        for planes in self.parts:
            values = [a * x + (b * y - c) for a, b, c in planes]
            distances.append(reduce(np.maximum, values))
        return reduce(np.minimum, distances)


@dataclass(frozen=True)
class Bar:
    """A strip across the whole image that hides what lies under it."""

    normal: tuple[float, float]
    offset: float
    half_width: float
    color: tuple[float, float, float]

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.abs(self.normal[0] * x + self.normal[1] * y - self.offset) - self.half_width


@dataclass(frozen=True)
class Scene:
    """What is on an image: objects from back to front, then bars before them."""

    shapes: tuple[Shape, ...]
    bars: tuple[Bar, ...]
    background: tuple[float, float, float]


class ShapesRecords(Records):
    """The records of one split, made when they are asked for.

    Args:
        size (`int`): number of images.
        seed (`int`): of the data set, 0 or more; the split is mixed into it.
        split (`str`): one of `SHAPES_SIZES`.
        image_size (`tuple[int, int]`): (height, width) in pixels; objects, 12 to 48 pixels on 128x128, scale with it.
        cache (`bool`, *optional*): keep annotations and drawn images in the memory of this process. On by default
            while the images of the whole split stay below 200 MB.
    """

    def __init__(
        self, size: int, seed: int, split: str, image_size: tuple[int, int] = (128, 128), cache: bool | None = None
    ) -> None:
        self.size = size
        self.split = split
        self.image_size = image_size
        self._entropy = (seed, list(SHAPES_SIZES).index(split))
        fits = size * image_size[0] * image_size[1] * 3 <= CACHE_BYTES
        self.cache = fits if cache is None else cache
        self._records: dict[int, ImageRecord] = {}
        self._images: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> ImageRecord:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside a split of {self.size} images")
        record = self._records.get(index)
        if record is None:
            record = self._record(index)
            if self.cache:
                self._records[index] = record
        return record

    def scene(self, index: int) -> Scene:
        """The scene of one image, without drawing it."""
        return _draw_up(np.random.default_rng([*self._entropy, index, 0]), *self.image_size)

    def image(self, index: int) -> Image.Image:
        """Draws one image, or takes it from the cache."""
        pixels = self._images.get(index)
        if pixels is None:
            pixels = _render(self.scene(index), np.random.default_rng([*self._entropy, index, 1]), *self.image_size)
            if self.cache:
                self._images[index] = pixels
        return Image.fromarray(pixels)

    def _record(self, index: int) -> ImageRecord:
        shapes = self.scene(index).shapes
        corners = np.array([shape.box for shape in shapes])
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        return ImageRecord(
            image_id=index,
            name=f"shapes/{self.split}/{index}",
            load=partial(self.image, index),
            boxes=boxes,
            categories=np.array([shape.category for shape in shapes], dtype=np.int64),
            area=boxes[:, 2] * boxes[:, 3],
            iscrowd=np.zeros(len(shapes), dtype=bool),
            width=self.image_size[1],
            height=self.image_size[0],
        )


def _draw_up(rng: np.random.Generator, height: int, width: int) -> Scene:
    """Places objects back to front, then bars; what would hide too much of an object is tried again, then left out."""
    background = rng.uniform(40, 215, 3)
    scale = min(height, width) / 128
    shapes: list[Shape] = []
    visible: list[np.ndarray] = []
    totals: list[int] = []
    for _ in range(int(rng.integers(1, 9))):
        for _ in range(10):
            shape = _random_shape(rng, height, width, scale, background)
            remaining = _left_visible(visible, totals, shape)
            if remaining is not None:
                inside = _sample_points(shape)
                shapes, visible, totals = [*shapes, shape], [*remaining, inside], [*totals, len(inside)]
                break
    bars: list[Bar] = []
    for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.4 else 0):
        for _ in range(10):
            bar = _random_bar(rng, height, width, scale)
            remaining = _left_visible(visible, totals, bar)
            if remaining is not None:
                bars, visible = [*bars, bar], remaining
                break
    return Scene(tuple(shapes), tuple(bars), tuple(background))


def _left_visible(visible: list[np.ndarray], totals: list[int], cover: Shape | Bar) -> list[np.ndarray] | None:
    """The sample points of each object that `cover` does not hide; `None` if of one too few are left."""
    if not visible:
        return []
    points = np.concatenate(visible)
    free = cover.distance(points[:, 0], points[:, 1]) > 0
    bounds = np.cumsum([len(left) for left in visible])[:-1]
    remaining = [left[keep] for left, keep in zip(visible, np.split(free, bounds), strict=True)]
    enough = all(len(left) >= MIN_VISIBLE * total for left, total in zip(remaining, totals, strict=True))
    return remaining if enough else None


def _sample_points(shape: Shape) -> np.ndarray:
    """Points of an 8x8 grid over the box that lie on the object, `(num_points, 2)`."""
    box = np.array(shape.box)
    points = box[:2] + _GRID * (box[2:] - box[:2])
    return points[shape.distance(points[:, 0], points[:, 1]) < 0]


def _random_shape(rng: np.random.Generator, height: int, width: int, scale: float, background: np.ndarray) -> Shape:
    """An object anywhere in the image, of a colour that stands out from the background."""
    category = int(rng.integers(len(SHAPE_CLASSES)))
    longest = rng.uniform(12, 48) * scale
    color = rng.uniform(0, 255, 3)
    while np.abs(color - background).sum() < 140:
        color = rng.uniform(0, 255, 3)
    if category in _RADIAL:
        extent, polygons = np.array([longest, longest]), list[np.ndarray]()
    else:
        extent, polygons = _random_polygons(rng, SHAPE_CLASSES[category], longest, 12 * scale)
    corner = rng.uniform(0, 1, 2) * (np.array([width, height]) - extent)
    parts = tuple(_half_planes((polygon + corner).tolist()) for polygon in polygons)
    return Shape(category, (*corner, *(corner + extent)), tuple(color), parts)


def _random_polygons(
    rng: np.random.Generator, name: str, longest: float, shortest: float
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Polygons turned and scaled until their common box, which starts at (0, 0), is `longest` pixels long; a box that
    would be thinner than `shortest` is enlarged. Returns the box's (width, height) and the polygons."""
    polygons = _unit_polygons(rng, name)
    turn = np.deg2rad(rng.uniform(-1, 1) * _HALF_TURN[name])
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    polygons = [polygon @ rotation for polygon in polygons]
    corners = np.concatenate(polygons)
    origin, extent = corners.min(0), np.ptp(corners, axis=0)
    scale = max(longest / extent.max(), shortest / extent.min())
    return extent * scale, [(polygon - origin) * scale for polygon in polygons]


def _unit_polygons(rng: np.random.Generator, name: str) -> list[np.ndarray]:
    rectangle = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    if name == "box":
        return [rectangle * (1.0, rng.uniform(0.6, 1.0))[:: rng.choice((-1, 1))]]
    if name == "cross":
        thin = rng.uniform(0.28, 0.4)
        return [rectangle * (1.0, thin), rectangle * (thin, 1.0)]
    if name == "diamond":
        slim = (1.0, rng.uniform(0.65, 1.0))[:: rng.choice((-1, 1))]
        return [np.array([[0.0, -1.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]) * slim]
    angles = np.deg2rad([-90.0, 30.0, 150.0])
    return [np.stack([np.cos(angles), np.sin(angles)], -1)]


def _half_planes(polygon: list[list[float]]) -> list[tuple[float, float, float]]:
    """Edges of a convex polygon given clockwise on the screen, each an outward normal and an offset."""
    planes = []
    for (x0, y0), (x1, y1) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        length = math.hypot(x1 - x0, y1 - y0)
        a, b = (y1 - y0) / length, (x0 - x1) / length
        planes.append((a, b, a * x0 + b * y0))
    return planes


def _random_bar(rng: np.random.Generator, height: int, width: int, scale: float) -> Bar:
    angle = rng.uniform(0, np.pi)
    normal = (float(np.cos(angle)), float(np.sin(angle)))
    through = rng.uniform(0, 1, 2) * (width, height)
    offset = float(normal[0] * through[0] + normal[1] * through[1])
    return Bar(normal, offset, rng.uniform(1.0, 3.0) * scale, tuple(rng.uniform(0, 255, 3)))


def _render(scene: Scene, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Background and clutter lines, objects, bars, then texture and noise over all; uint8 `(height, width, 3)`."""
    canvas = _background(scene, rng, height, width)
    for shape in scene.shapes:
        x0, y0, x1, y1 = shape.box
        rows = slice(max(int(y0) - 1, 0), min(int(y1) + 2, height))
        columns = slice(max(int(x0) - 1, 0), min(int(x1) + 2, width))
        _paint(canvas, shape, rows, columns)
    for bar in scene.bars:
        _paint(canvas, bar, slice(0, height), slice(0, width))
    grain = _enlarge(rng.integers(0, 256, (32, 32), dtype=np.uint8), height, width)
    luminance = np.asarray(grain, dtype=np.float32) * np.float32(rng.uniform(0.05, 0.25))
    luminance -= luminance.mean()
    luminance += rng.standard_normal((height, width), dtype=np.float32) * np.float32(rng.uniform(3, 12))
    canvas += luminance[..., None]
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)


def _background(scene: Scene, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Two scales of colour texture and clutter lines, float32 `(height, width, 3)`."""
    coarse = np.asarray(_enlarge(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), 16, 16), dtype=np.float32)
    texture = 0.35 * (coarse - 127.5) + rng.uniform(-25, 25, (16, 16, 3)) + scene.background
    picture = _enlarge(np.clip(texture, 0, 255).astype(np.uint8), height, width)
    pen = ImageDraw.Draw(picture)
    thick = max(1, round(min(height, width) / 128))
    for _ in range(int(rng.integers(3, 11))):
        x0, y0, x1, y1 = (rng.uniform(-0.1, 1.1, 4) * (width, height, width, height)).tolist()
        color = tuple(rng.integers(0, 256, 3).tolist())
        pen.line([(x0, y0), (x1, y1)], fill=color, width=thick * int(rng.integers(1, 3)))
    return np.asarray(picture, dtype=np.float32)


def _enlarge(cells: np.ndarray, height: int, width: int) -> Image.Image:
    """A small uint8 picture, smoothly enlarged: texture from random cells."""
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def _paint(canvas: np.ndarray, cover: Shape | Bar, rows: slice, columns: slice) -> None:
    """Blends an antialiased object into a window of the canvas."""
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + np.float32(0.5)
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.float32(0.5)
    coverage = np.clip(0.5 - cover.distance(x, y), 0, 1).astype(np.float32)[..., None]
    window = canvas[rows, columns]
    window += coverage * (np.array(cover.color, dtype=np.float32) - window)
