"""What the files of a run's folder may hold, so that one that was damaged or edited is named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..data.checks import is_finite


ANY = "*"  # the key for every other entry of a dict
NUMBER = "a number"
TEXT = "text"
WHOLE = "a whole number"
SIZE = "a height and a width"
ANYTHING = "anything"


@dataclass(frozen=True)
class Needed:
    """A kind of which `None` is not, and whose key has to be there."""

    kind: Any


ROW = {
    **dict.fromkeys(("map", "map_50", "map_75", "seconds_per_step", "gflops"), NUMBER),
    "parameters": WHOLE,
    "classes": {ANY: NUMBER},
    "latency": {ANY: {ANY: NUMBER}},
    "image_size": SIZE,
    "precision": TEXT,
    ANY: ANYTHING,
}
MODELS = {ANY: Needed(ROW)}
FACT_KINDS = {
    **dict.fromkeys(("dataset_name", "train_split", "eval_split", "method", "command", "device", "family"), TEXT),
    **dict.fromkeys(
        ("train_images", "eval_images", "unlabeled_images", "processes", "batch_size", "seed", "steps"), WHOLE
    ),
    **dict.fromkeys(("mixed_precision", "hub_dataset", "base_model"), TEXT),
    "classes": [Needed(TEXT)],
    "methods": [Needed(TEXT)],
    "image_size": SIZE,
    "papers": [Needed({"title": TEXT, "arxiv": TEXT, "citation": TEXT, ANY: ANYTHING})],
    "teacher": {"name": Needed(TEXT), "source": TEXT, "revision": TEXT, ANY: ANYTHING},
    "versions": {ANY: TEXT},
    "arguments": {ANY: ANYTHING},
    "hub": {ANY: ANYTHING},
    "card": {ANY: ANYTHING},
    ANY: ANYTHING,
}


SURROGATE = re.compile("[\ud800-\udfff]")  # halves of characters, which no file can hold


def checked(value: Any, kind: Any, name: str) -> Any:
    """The value, if it is of a kind: one of the words above, a dict of kinds by key, or a list of one kind. `None` is
    of every kind but a [`Needed`] one.

    Args:
        value: as read from JSON.
        kind: see above.
        name (`str`): of the value, in messages.

    Raises:
        ValueError: it is of another kind.
    """
    if isinstance(kind, Needed):
        if value is None:
            raise ValueError(f"{name} is missing or empty: the file was damaged or edited.")
        kind = kind.kind
    if kind == ANYTHING or value is None:
        return value
    if isinstance(kind, dict) and isinstance(value, dict):
        needed = {key for key, one in kind.items() if isinstance(one, Needed)} - {ANY}
        for key in value.keys() | needed:
            checked(value.get(key), kind.get(key, kind.get(ANY, ANYTHING)), f"{name}: {ascii(key)[1:-1]:.40}")
        return value
    if isinstance(kind, list) and isinstance(value, list):
        for one in value:
            checked(one, kind[0], name)
        return value
    if isinstance(kind, str) and IS[kind](value):
        return value
    wanted = kind if isinstance(kind, str) else "a list" if isinstance(kind, list) else "a JSON object"
    raise ValueError(f"{name} must be {wanted}, got {value!a:.60}: the file was damaged or edited.")


IS = {
    NUMBER: is_finite,
    SIZE: lambda value: isinstance(value, list) and len(value) == 2 and all(type(one) is int for one in value),
    WHOLE: lambda value: type(value) is int and abs(value) < 2**63,
    TEXT: lambda value: isinstance(value, str) and not SURROGATE.search(value),
}
