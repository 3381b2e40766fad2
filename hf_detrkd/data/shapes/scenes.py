"""Generates the scenes of the data set `shapes`: objects and their places, without pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import numpy as np


SHAPE_CLASSES = ["disc", "box", "triangle", "cross", "ring", "diamond"]
MIN_VISIBLE = 0.6
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
    """A strip across the whole image that hides everything under it."""

    normal: tuple[float, float]
    offset: float
    half_width: float
    color: tuple[float, float, float]

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.abs(self.normal[0] * x + self.normal[1] * y - self.offset) - self.half_width


@dataclass(frozen=True)
class Scene:
    """The content of an image: objects from back to front, then bars in front of them."""

    shapes: tuple[Shape, ...]
    bars: tuple[Bar, ...]
    background: tuple[float, float, float]


def draw_up(rng: np.random.Generator, height: int, width: int) -> Scene:
    """Places objects back to front, then bars; one that would hide too much of an object is redrawn, then skipped."""
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
    """The sample points of each object that `cover` does not hide; `None` if an object keeps too few."""
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
