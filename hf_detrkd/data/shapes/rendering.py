"""Renders the scenes of the data set `shapes`."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .scenes import Bar, Scene, Shape


def render(scene: Scene, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
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
    """A small uint8 image, smoothly enlarged: texture from random cells."""
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def _paint(canvas: np.ndarray, cover: Shape | Bar, rows: slice, columns: slice) -> None:
    """Blends an antialiased object into a window of the canvas."""
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + np.float32(0.5)
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.float32(0.5)
    coverage = np.clip(0.5 - cover.distance(x, y), 0, 1).astype(np.float32)[..., None]
    window = canvas[rows, columns]
    window += coverage * (np.array(cover.color, dtype=np.float32) - window)
