"""Defaults of the command line that suit detectors; those of transformers evaluate nothing and keep no best model."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


EPOCHS = {"num_train_epochs": 50}
BEST = {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 2, "load_best_model_at_end": True}
SCHEDULE = {"warmup_steps": 0.05, "lr_scheduler_type": "cosine"}
RATE = {"learning_rate": 1e-4}
DECAY = {"weight_decay": 1e-4}
PRETRAINED = {"backbone_learning_rate": 1e-5}
"""Default values; those of a dict are taken together, if none of them is given."""

SEPARATE = {"save_total_limit"}
"""Arguments of these dicts that may be given without the others."""

REPLACES = {
    "num_train_epochs": {"max_steps"},
    "eval_strategy": {"eval_steps", "save_steps"},
    "warmup_steps": {"warmup_ratio", "lr_scheduler_kwargs"},
    "backbone_learning_rate": {"learning_rate", "learning_rate_factors", "freeze"},
}
"""Arguments that are about the same, by the first one of a dict."""

UNSET = object()


def training_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults for a run, by argument.

    Args:
        given (`dict[str, Any]`): the arguments that the command line or a recipe sets.
    """
    groups: list[dict[str, Any]] = [EPOCHS, BEST, SCHEDULE, RATE, DECAY]
    if given.get("streaming"):
        groups.remove(BEST)  # a stream has no epochs
    if given.get("model_name_or_path") or given.get("backbone_weights"):
        groups.append(PRETRAINED)
    found: dict[str, Any] = {}
    for group in groups:
        own = group.keys() - SEPARATE
        if not given.keys() & (own | REPLACES.get(next(iter(group)), set())):
            found |= {name: value for name, value in group.items() if name not in given}
    return found


def given_arguments(parser: argparse.ArgumentParser, words: Sequence[str], names: Iterable[str]) -> dict[str, Any]:
    """The arguments that the words of a command line set, and `names`, which a recipe sets in other ways."""
    unset = argparse.Namespace(**{action.dest: UNSET for action in parser._actions})
    found = vars(parser.parse_args(list(words), unset))
    return dict.fromkeys(names) | {name: value for name, value in found.items() if value is not UNSET}
