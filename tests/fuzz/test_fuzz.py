"""No broken input ends in an error of another package, hangs, or is taken with a value that cannot be right."""

from __future__ import annotations

import logging
import os
import random
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import hf_detrkd
from tests.fuzz.broken import broken_bytes, broken_value
from tests.fuzz.readers import FILES, STRUCTURED, VALUES, dump, prepare


PACKAGE = Path(hf_detrkd.__file__).parent
EACH = int(os.environ.get("HF_DETRKD_FUZZ", "60"))  # inputs of each reader; `make fuzz` sets more
SECONDS = 10
NAMED = (ValueError, SystemExit)  # the second by the parser of arguments, after it has said why


class TooSlow(BaseException):
    """An input that takes more than [`SECONDS`]."""


@contextmanager
def limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def complaint(read: Callable[[Any], Any], given: Any) -> str | None:
    """What is wrong with how an input is read, or `None`: it is taken, or refused by a check of this package."""
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(given)
    except TooSlow:
        return f"took more than {SECONDS} s"
    except NAMED as error:
        last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if isinstance(error, SystemExit) or last.is_relative_to(PACKAGE):
            return None
        return f"{type(error).__name__} of {last.name}: {error!s:.300}"
    except Exception as error:
        last_frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(last_frame.filename).name}:{last_frame.lineno}: {error!s:.300}"
    return None


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", FILES)
def test_broken_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(f"{name} {EACH}")
    sound, (file, _, read) = prepare(name, tmp_path), FILES[name]
    found = {}
    for _ in range(EACH):
        if name in STRUCTURED and draw.random() < 0.6:
            content = dump(broken_value(STRUCTURED[name], draw))
        else:
            content = broken_bytes(sound, draw)
        (tmp_path / file).write_bytes(content)
        said = complaint(read, tmp_path)
        if said is not None:
            found.setdefault(said, content)
    capsys.readouterr()
    assert not found, "\n".join(f"{said}\n    {content!r:.400}" for said, content in list(found.items())[:20])


@pytest.mark.parametrize("name", VALUES)
def test_broken_values(name: str) -> None:
    draw = random.Random(f"{name} {EACH}")
    sound, read = VALUES[name]
    found = {}
    for _ in range(EACH):
        value = broken_value(sound, draw)
        said = complaint(read, value)
        if said is not None:
            found.setdefault(said, value)
    assert not found, "\n".join(f"{said}\n    {value!r:.400}" for said, value in list(found.items())[:20])
