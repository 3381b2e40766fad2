"""MkDocs hook: links of a page that leave `docs/` lead to the repository, so that they work here and on GitHub."""

from __future__ import annotations

import posixpath
import re
from typing import Any


LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **kwargs: Any) -> str:
    folder = posixpath.dirname(page.file.src_uri)

    def absolute(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, link["path"]))
        if path == "docs" or path.startswith("docs/"):
            return link[0]
        kind = "blob" if posixpath.splitext(path)[1] else "tree"
        return f"]({config.repo_url}/{kind}/main/{path}{link['anchor'] or ''})"

    return LINK.sub(absolute, markdown)
