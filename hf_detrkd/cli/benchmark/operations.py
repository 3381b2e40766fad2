"""`benchmark.py operations`: operations and device waits of a training step, which do not depend on the machine."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from .methods import FEW, chosen_variants, words_of
from .step_cost import PARTS, Meter, one_step, trainer_of


COUNTED = ("operations", *PARTS[1:], "casts", "waits")
# Operations whose result the host has to wait for: numbers, and tensors whose size depends on values.
WAITING = {"_local_scalar_dense", "_unique2", "equal", "masked_select", "nonzero", "unique_consecutive"}


INDEXING = {"index", "index_put", "index_put_"}


def by_mask(indices: Sequence[torch.Tensor | None]) -> bool:
    """True if an index is a mask, whose elements have to be counted."""
    return any(index is not None and index.dtype == torch.bool for index in indices)


class Operations(TorchDispatchMode, Meter):
    """Counts the operations of a step by part, those that give a view left out, as they start no work on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.parts: list[str] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.parts.append(name)
        try:
            yield
        finally:
            self.parts.pop()

    def count(self, name: str, number: int = 1) -> None:
        """Counts towards the step and its innermost part. Reading and optimizer are not the step's."""
        if self.parts and self.parts[-1] not in ("reading", "optimizer"):
            self.counts[name] += number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("detach", "_unsafe_view"):
            self.count("operations")
            self.count(self.parts[-1] if self.parts else "")
            self.count("casts", name == "_to_copy")
        self.count("waits", name in WAITING or (name in INDEXING and by_mask(args[1])))
        return func(*args, **kwargs or {})


class HostCopies(TorchFunctionMode):
    """Counts copies to the host as waits; on a CPU they are no operation."""

    def __init__(self, operations: Operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.count("waits", func is torch.Tensor.cpu)
        return func(*args, **kwargs or {})


def operations_of(arguments: list[str]) -> dict[str, int]:
    """Operations of the second forward and backward pass of a run, and by part; casts and waits among them."""
    trainer, _ = trainer_of(arguments)
    one_step(trainer, Operations())
    operations = Operations()
    with operations, HostCopies(operations):
        one_step(trainer, operations)
    return {name: operations.counts[name] for name in COUNTED}


def operations_table(found: dict[str, dict[str, int]]) -> str:
    first = next(iter(found.values()))["operations"]
    own = f"without the {PARTS[1]}, / first"
    lines = [f"| run | operations | / first | {own} | {' | '.join(COUNTED[1:])} |", "|---" * (len(COUNTED) + 3) + "|"]
    for name, counts in found.items():
        total = counts["operations"]
        ratios = f"{total / first:.2f} | {(total - counts[PARTS[1]]) / first:.2f}"
        lines.append(f"| {name} | {total} | {ratios} | {' | '.join(str(counts[part]) for part in COUNTED[1:])} |")
    return "\n".join(lines)


def operations(given: argparse.Namespace) -> dict[str, Any]:
    """Prints the table and returns its figures."""
    _, chosen, common = chosen_variants(given)
    found = {}
    for name in tqdm(chosen, desc="operations", leave=False):
        place = {"output_dir": f"{given.output_dir}/operations/{name}"}
        found[name] = operations_of(words_of(common | FEW | chosen[name] | place))
    print(operations_table(found))
    return found
