"""Names of other people in Markdown: on one line, and without the power to be a table, a link or HTML."""

from __future__ import annotations

import re


def plain(text: object) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#~!&])", r"\\\1", " ".join(str(text).split()))


def code(text: object) -> str:
    """Text as code, in backticks; its own become apostrophes."""
    return f"`{' '.join(str(text).split()).replace('`', chr(39)) or ' '}`"
