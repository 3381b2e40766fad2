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


def recipes() -> dict[str, Path]:
    """The recipes of runs that come with the package, by the names that `--config` takes."""
    folder = shipped("scripts/recipes")
    if folder is None:
        return {}
    files = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path))  # those of folders last
    files = [path for path in files if not is_series(path)]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def is_series(file: Path) -> bool:
    """True for the variants of a series, which scripts/ablate.py takes."""
    return any(line.startswith("variants:") for line in file.read_text().splitlines())
