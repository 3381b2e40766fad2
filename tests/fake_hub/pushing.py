"""Files that the tests of the test Hub push to it."""

from __future__ import annotations

import importlib
from pathlib import Path

import huggingface_hub
import pytest
from packaging.version import Version

from tests.hub_server import HubServer


# Whose errors the client raises: that of its own major version.
httpx = importlib.import_module("httpx2" if Version(huggingface_hub.__version__).major >= 2 else "httpx")
quiet = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own uploads
STUDENT = "user/student"
FILES = {
    "README.md": b"---\npipeline_tag: object-detection\ntags: [shapes]\n---\n# A student\n",
    "config.json": b'{"model_type": "detr"}',
    "empty.bin": b"",
    "model.safetensors": bytes(range(256)) * 1200,
    "pictures/first.png": b"\x89PNG\r\n\0\0",
    "pictures/more/second.txt": "Größe".encode(),
}


def contents(folder: str | Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def uploads(hub: HubServer) -> list[int]:
    """Statuses of the large files' uploads."""
    return [status for method, _, status in hub.requests if method == "PUT"]
