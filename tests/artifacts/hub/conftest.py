"""A Hub that processes started from a test take for theirs, an output folder, and what the package warns of."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_detrkd.artifacts.hub.background_push import HubPush
from tests.artifacts.hub.folders import FILES


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts more, as always, after shorter waits."""
    assert HubPush.waits == (2.0, 8.0)
    monkeypatch.setattr(HubPush, "waits", (0.1, 0.4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the package warns of."""
    said: list[str] = []
    monkeypatch.setattr("hf_detrkd.artifacts.hub.background_push.logger.warning", said.append)
    return said
