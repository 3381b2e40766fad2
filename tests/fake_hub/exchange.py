"""Requests to the Hub, its answers, its refusals, and faults on demand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs


Json = dict[str, Any]


@dataclass
class HubError(Exception):
    """A refusal, as the Hub words it.

    Attributes:
        status (`int`): of HTTP.
        message (`str`)
        code (`str`, *optional*): from which the client picks its exception.
        extra (`dict`): more fields of the JSON that is answered.
    """

    status: int
    message: str
    code: str | None = None
    extra: Json = field(default_factory=dict)


@dataclass
class Exchange:
    """A request, names of headers in small letters, and the status of the answer: 0 until one has been sent whole."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytearray = field(default_factory=bytearray)
    status: int = 0

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def query(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(self.path.partition("?")[2]).items()}

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    content: Any = None  # bytes, or what becomes JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()


@dataclass
class Fault:
    """What goes wrong with the next requests; `times` counts down to 0."""

    pattern: re.Pattern[str]
    times: int
    answer: Answer | None
    drop: bool
    after_bytes: int
    lose_answer: bool
    delay: float
