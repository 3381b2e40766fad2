"""The test suite, in the rooms of the package. Imports nothing slow: pytest-xdist's first process runs no test."""

import functools
import importlib.util
import inspect
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any


ROOT = Path(__file__).parent.parent  # of the repository


def script(name: str) -> ModuleType:
    """A file of `scripts/` as a module."""
    found = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def seed_all() -> None:
    """The same random state, whatever ran before."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def each(names: str | tuple[str, ...], cases: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`pytest.mark.parametrize` as a loop, for grids of many cheap cases; every case starts from the same seed.

    Args:
        names (`str` or `tuple[str]`): arguments of the test, which may also be separated by commas.
        cases (`Iterable`): a value, or a tuple of values, for each run.
    """
    given = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    runs = list(cases)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def loop(**fixtures: Any) -> None:
            assert runs
            for run in runs:
                values = dict(zip(given, [run] if len(given) == 1 else run, strict=True))
                seed_all()
                try:
                    test(**fixtures, **values)
                except BaseException:
                    print(f"case: {values}")  # pytest shows it with the failure
                    raise

        parameters = inspect.signature(test).parameters.values()
        loop.__signature__ = inspect.Signature([p for p in parameters if p.name not in given])
        return loop

    return decorate
