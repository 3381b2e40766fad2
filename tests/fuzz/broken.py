"""Breaks bytes and values at random, by a seed."""

from __future__ import annotations

import copy
import random
from typing import Any


ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        " ",
        "x",
        "x" * 300,
        "../../x",
        "/etc/passwd",
        "a\0b",
        "\n",
        "\u0661\u0662",
    ),
    *("nan", "1e400", "🙂", "\ud800", [], {}, [[]], [None], {"a": 1}, [1, 2, 3], ["x"] * 40),
]
TOKENS = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"{",
    b"[" * 3000,
    b"}",
    b"]",
    b",",
    b":",
    b"\t",
    b"\r",
    b"nan",
    b"1e999",
]
TOKENS += [
    b"-",
    b"9" * 400,
    b"<",
    b"&x;",
    b"!!python/object:os.system [x]",
    b"*a",
    b"&a [*a]",
    b"\xf0\x9f",
    b"null",
    b"- ",
]


def broken_bytes(content: bytes, draw: random.Random) -> bytes:
    """A few random cuts, swaps and insertions."""
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(content) + 1)
        end = min(len(content), place + draw.choice([1, 2, 8, 64]))
        kind = draw.randrange(6)
        if kind == 0:
            content = content[:place]
        elif kind == 1:
            content = content[:place] + content[end:]
        elif kind == 2:
            content = content[:place] + draw.choice(TOKENS) + content[place:]
        elif kind == 3:
            content = content[:place] + draw.choice(TOKENS) + content[end:]
        elif kind == 4:
            content = content[:place] + draw.randbytes(end - place) + content[end:]
        else:
            content = content[:place] + content[place:end] * 3 + content[end:]
    return content


def broken_value(value: Any, draw: random.Random) -> Any:
    """A copy in which one to three inner values, keys or entries are odd."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        places = [(value, key) for key in _keys(value)]
        stack = [value[key] for key in _keys(value)]
        while stack:
            inner = stack.pop()
            places += [(inner, key) for key in _keys(inner)]
            stack += [inner[key] for key in _keys(inner)]
        if not places:
            return draw.choice(ODD)
        parent, key = draw.choice(places)
        if draw.random() < 0.2:
            del parent[key]
        elif isinstance(parent, list) and draw.random() < 0.2:
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            parent[key] = copy.deepcopy(draw.choice(ODD))
    return value


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []
