"""Finds the recipes and accelerate configurations that come with the package."""

from __future__ import annotations

from pathlib import Path


PACKAGE = Path(__file__).parent.parent


def shipped(path: str) -> Path | None:
    """A file or folder below `scripts/`, from an installed package or a checkout; `None` if there is none.

    Args:
        path (`str`): for example `scripts/recipes/quickstart.yaml`.
    """
    places = (PACKAGE / path, PACKAGE.parent / path)
    return next((place for place in places if place.exists()), None)
