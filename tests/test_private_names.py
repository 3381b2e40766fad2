"""Private names of other packages that this one uses: each is known, and there in the installed version."""

from __future__ import annotations

import argparse
import ast
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torchvision.transforms import v2
from transformers.integrations import TensorBoardCallback

import hf_detrkd


PACKAGE = Path(hf_detrkd.__file__).parent

READ: dict[str, Any] = {
    "_actions": argparse.ArgumentParser(),
    "_add_action": argparse.ArgumentParser,
    "_attn_implementation_internal": transformers.RTDetrConfig(),
    "_call_kernel": v2.RandomZoomOut,
    "_dynamo": torch,
    "_foreach_lerp_": torch,
    "_format_args": argparse.HelpFormatter("x"),
    "_get_default_store": torch.distributed.distributed_c10d,
    "_get_formatter": argparse.ArgumentParser,
    "_determine_best_metric": transformers.Trainer,
    "_foreach_norm": torch,
    "_get_output_dir": transformers.Trainer,
    "_get_train_sampler": transformers.Trainer,
    "_init_summary_writer": TensorBoardCallback,
    "_init_weights": transformers.PreTrainedModel,
    "_initialize_weights": transformers.PreTrainedModel,
    "_load_rng_state": transformers.Trainer,
    "_prepare_inputs": transformers.Trainer,
    "_replace": namedtuple("Any", "field"),  # public in spite of its name
    "_save_checkpoint": transformers.Trainer,
    "_save_rng_state": transformers.Trainer,
    "_train_batch_size": transformers.Trainer,
}
"""Names that are read or called, and who has them."""

OVERRIDDEN = {
    "_determine_best_metric",
    "_finish_current_push",
    "_get_output_dir",
    "_get_train_sampler",
    "_init_weights",
    "_initialize_weights",
    "_load_best_model",
    "_load_from_checkpoint",
    "_no_split_modules",
    "_prepare_inputs",
    "_push_from_checkpoint",
    "_save",
    "_save_checkpoint",
    "_save_rng_state",
}
"""Names that transformers calls or reads on our subclasses."""


def trees() -> Iterator[ast.AST]:
    for file in PACKAGE.rglob("*.py"):
        yield from ast.walk(ast.parse(file.read_text()))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names() -> set[str]:
    """Private names that this package defines."""
    found = set()
    for node in trees():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


def test_every_private_name_of_another_package_is_known() -> None:
    read = {n.attr for n in trees() if isinstance(n, ast.Attribute) and is_private(n.attr)} - own_names()
    through_super = {
        node.attr
        for node in trees()
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()" and is_private(node.attr)
    }
    inherited = {name for name in through_super if any(hasattr(kind, name) for kind in KINDS)}
    assert read | inherited <= READ.keys()


KINDS = (transformers.Trainer, transformers.PreTrainedModel)


def test_every_private_name_that_is_overridden_is_known() -> None:
    ours = {node.name for node in trees() if isinstance(node, ast.FunctionDef)}
    assert {name for name in ours if is_private(name) and any(hasattr(kind, name) for kind in KINDS)} <= OVERRIDDEN


@pytest.mark.parametrize("name", sorted(READ))
def test_it_is_there(name: str) -> None:
    if name == "_train_batch_size":  # set by the trainer itself
        assert "self._train_batch_size" in Path(transformers.trainer.__file__).read_text()
    else:
        assert hasattr(READ[name], name)


@pytest.mark.parametrize("name", sorted(OVERRIDDEN))
def test_transformers_still_calls_it(name: str) -> None:
    assert any(hasattr(kind, name) for kind in KINDS)


def test_no_private_name_is_imported() -> None:
    names = {
        f"{node.module}.{alias.name}"
        for node in trees()
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module
        for alias in node.names
        if is_private(alias.name) or any(map(is_private, node.module.split(".")))
    }
    assert names == {"torch.utils._python_dispatch.TorchDispatchMode"}  # public, by this path
