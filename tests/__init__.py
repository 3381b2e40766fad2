"""The test suite, in the rooms of the package."""

import importlib.util
from pathlib import Path
from types import ModuleType


ROOT = Path(__file__).parent.parent  # of the repository


def script(name: str) -> ModuleType:
    """A file of `scripts/` as a module."""
    found = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
