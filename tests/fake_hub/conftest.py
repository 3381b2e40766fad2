"""A Hub, its client, and a folder that is pushed to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, close_session, constants

from tests.fake_hub.pushing import FILES, STUDENT
from tests.hub_server import HubServer


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets this process ask the Hub, as [`HubServer.environment`] lets others."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield
    close_session()


@pytest.fixture
def api(hub: HubServer, online: None) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        file = tmp_path / "folder" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return tmp_path / "folder"


@pytest.fixture
def pushed(api: HfApi, folder: Path) -> HfApi:
    """A client that has made a private repository and uploaded the folder."""
    api.create_repo(STUDENT, private=True)
    api.upload_folder(repo_id=STUDENT, folder_path=folder)
    return api
