"""Detects wrong box formats (xyxy, cxcywh, normalised, rescaled) by comparison with a teacher's boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from .teacher_views import Seen, overlaps


LEAST_BOXES = 10  # fewer are no evidence

Frame = Callable[[np.ndarray, tuple[int, int]], np.ndarray]
"""Corners `(num_boxes, 4)` as loaded, and (height, width) of the image, to corners in its pixels."""


def _as_read(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return corners


def _corners(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)


def _centres(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    half = (corners[:, 2:] - corners[:, :2]) / 2
    return np.concatenate([corners[:, :2] - half, corners[:, :2] + half], 1)


def _transposed(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return corners[:, [1, 0, 3, 2]]


def _relative(frame: Frame) -> Frame:
    return lambda corners, size: frame(corners, size) * _canvas(size)


def _linear(scale: np.ndarray, shift: np.ndarray) -> Frame:
    return lambda corners, size: corners * np.tile(scale, 2) + np.tile(shift, 2)


def _canvas(size: tuple[int, int]) -> np.ndarray:
    return np.array([size[1], size[0], size[1], size[0]], dtype=float)


FRAMES: dict[str, Frame] = {
    "x_min, y_min, x_max, y_max": _corners,
    "centre x, centre y, width, height": _centres,
    "y, x, height, width": _transposed,
    "x, y, width, height divided by the image's": _relative(_as_read),
    "x_min, y_min, x_max, y_max divided by the image's width and height": _relative(_corners),
    "centre x, centre y, width, height divided by the image's": _relative(_centres),
}


def reframed(seen: Sequence[Seen], frame: Frame) -> list[Seen]:
    """The same images with the annotated boxes reinterpreted in a frame, except boxes at the lower or right border:
    they may have been clipped on loading."""
    found = []
    for image in seen:
        whole = (image.truth[:, 2:] < np.array(image.size[::-1]) - 0.5).all(1)
        truth = frame(image.truth[whole], image.size)
        right = (truth[:, 2:] > truth[:, :2]).all(1)
        found.append(replace(image, truth=truth[right], labels=image.labels[whole][right]))
    return found


def agreement(seen: Sequence[Seen], frame: Frame) -> float:
    """Fraction of the annotated boxes, reinterpreted in a frame, that overlap one of the teacher's best with an IoU of
    0.5 or more; NaN if there are too few."""
    total = sum(len(image.truth) for image in reframed(seen, _as_read))
    if total < LEAST_BOXES:
        return float("nan")
    pairs = zip(reframed(seen, frame), seen, strict=True)
    return sum(int((overlaps(i.truth, given.best()) >= 0.5).any(1).sum()) for i, given in pairs) / total


def better_frame(seen: Sequence[Seen]) -> tuple[str, Frame, float, float] | None:
    """The frame in which the annotated boxes match the teacher's far better than as loaded.

    Returns:
        its description, the frame, the agreement as loaded and in this frame; `None` if there is no such frame.
    """
    now = agreement(seen, _as_read)
    best: tuple[str, Frame, float] = "", _as_read, now
    for words, frame in [*FRAMES.items(), *_scaled(seen)]:
        found = agreement(seen, frame)
        if found > best[2] + 0.02:  # prefers the first and simplest
            best = words, frame, found
    return (*best[:2], now, best[2]) if best[2] >= 0.4 and best[2] >= now + 0.25 else None


def _scaled(seen: Sequence[Seen]) -> Iterator[tuple[str, Frame]]:
    """Frames with another scale and origin, fitted to the teacher's boxes: in pixels, and relative to the image size
    (boxes of images that were all resized to one size)."""
    images = [image for image in seen if len(image.truth) and len(image.boxes)]
    if sum(len(image.truth) for image in images) < LEAST_BOXES:
        return
    for whole in (False, True):
        units = [_canvas(image.size) if whole else np.ones(4) for image in images]
        goals = [image.best() / unit for image, unit in zip(images, units, strict=True)]
        scale, shift = _fitted([image.truth for image in images], goals)
        linear, (width, height) = _linear(scale, shift), 1 / np.maximum(scale, 1e-9)
        if whole:
            words = f"boxes of images resized to about {height:.0f} x {width:.0f} pixels (height x width)"
            yield words, _relative(linear)
        else:
            words = f"boxes of images {width:.2f} times as wide and {height:.2f} times as high"
            moved = f", moved by {-shift[0] * width:.1f} and {-shift[1] * height:.1f} pixels"
            yield words + (moved if np.abs(shift).max() > 2 else ""), linear


def _fitted(truth: list[np.ndarray], goals: list[np.ndarray], rounds: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift of x and y, `(2,)` each, that map boxes to others: repeated least squares on the better half of
    the nearest pairs."""
    given, wanted = np.concatenate(truth), np.concatenate(goals)
    scale = np.median(wanted[:, 2:] - wanted[:, :2], axis=0) / np.median(given[:, 2:] - given[:, :2], axis=0)
    shift = np.zeros(2)
    for _ in range(rounds):
        pairs: list[tuple[float, np.ndarray, np.ndarray]] = []
        for boxes, goal in zip(truth, goals, strict=True):
            apart = np.abs((boxes * np.tile(scale, 2) + np.tile(shift, 2))[:, None] - goal[None]).sum(-1)
            pairs += [(float(row.min()), box, goal[row.argmin()]) for row, box in zip(apart, boxes, strict=True)]
        pairs.sort(key=lambda pair: pair[0])
        near = pairs[: max(2, len(pairs) // 2)]
        start, end = (np.stack([pair[i] for pair in near]) for i in (1, 2))
        lines = [np.polyfit(start[:, axis::2].ravel(), end[:, axis::2].ravel(), 1) for axis in (0, 1)]
        scale, shift = np.array([line[0] for line in lines]), np.array([line[1] for line in lines])
    return scale, shift
