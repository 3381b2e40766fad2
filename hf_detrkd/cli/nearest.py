"""The nearest of the known words, for what was mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: object, known: Iterable[str], otherwise: str) -> str:
    """`did you mean ...?`, or another sentence if no known word is near."""
    near = difflib.get_close_matches(str(word), list(known), 1)
    return f"did you mean {near[0]}?" if near else otherwise
