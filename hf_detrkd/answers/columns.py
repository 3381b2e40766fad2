"""A teacher's output as named columns of tensors, one row per image, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..data.frame import moved
from ..structures.outputs import Activation, DetectorOutput, FeatureMap, ObjectQueries, Predictions
from ..structures.teacher_parts import TeacherParts


Columns = dict[str, Tensor]
"""Tensors by column name, the images along the first dimension."""

PREDICTED = ("logits", "boxes", "hidden_states", "class_boxes")
EXACT = ("boxes", "class_boxes", "points")  # places need float32: 16 bits round them to several pixels
LOWEST = -1e4  # a logit without score, which 16 bits hold
STORED = {"float16": torch.float16, "float32": torch.float32}


def as_columns(output: DetectorOutput, decoded: Mapping[str, tuple[Predictions, ...]], parts: TeacherParts) -> Columns:
    """The wanted parts of a teacher's output.

    Args:
        output ([`DetectorOutput`])
        decoded (`dict[str, tuple[Predictions, ...]]`): predictions for extra queries, by `<method>/<request>`.
        parts ([`TeacherParts`])

    Raises:
        ValueError: feature maps of padded images, whose size depends on the batch.
    """
    columns: Columns = {}
    for number, layer in enumerate(output.layers if parts.all_layers else output.layers[-1:]):
        columns |= _predicted(f"layers/{number}", layer, parts.states)
    for name, layers in decoded.items():
        for number, layer in enumerate(layers):
            columns |= _predicted(f"decoded/{name}/{number}", layer, False)
    fields = output.queries.tensors
    columns |= {f"queries/{name}": fields[name] for name in sorted(parts.queries & fields.keys())}
    for name in sorted(parts.features):
        for level, each in enumerate(output.features[name]):
            if each.padding is not None:
                raise ValueError(
                    "Feature maps of padded images cannot be stored, since their size depends on the batch: set "
                    "--keep_aspect_ratio false, or leave out the terms that compare feature maps."
                )
            columns[f"features/{name}/{level}"] = each.values
    return columns


def _predicted(name: str, layer: Predictions, states: bool) -> Columns:
    tensors = {part: vars(layer)[part] for part in PREDICTED if part != "hidden_states" or states}
    return {f"{name}/{part}": values for part, values in tensors.items() if values is not None}


def rows_of(columns: Columns, parts: TeacherParts, counts: Sequence[int], stored: torch.dtype) -> list[dict[str, Any]]:
    """One row of numpy arrays per image: numbers in `stored` precision, places in float32, indices in int32.

    Args:
        columns: of a batch.
        parts ([`TeacherParts`])
        counts (`Sequence[int]`): number of ground-truth boxes of each image; further rows of `per_box` requests are
            padding, and left out.
        stored (`torch.dtype`): float16 or float32.
    """
    kept: dict[str, Any] = {}
    for name, values in columns.items():
        part = name.rsplit("/", 1)[-1]
        wanted = torch.float32 if part in EXACT else stored if values.is_floating_point() else torch.int32
        kept[name] = values.detach().to("cpu", wanted).numpy()
    ragged = {name for name in kept if is_per_box(name, parts)}
    return [
        {name: values[row, :count] if name in ragged else values[row] for name, values in kept.items()}
        for row, count in enumerate(counts)
    ]


def last_layer(columns: Iterable[str]) -> str:
    """Start of the columns of the teacher's last layer."""
    return f"layers/{max(int(name.split('/')[1]) for name in columns if name.startswith('layers/'))}"


def is_per_box(column: str, parts: TeacherParts) -> bool:
    """True if a column has one entry per ground-truth box of its image."""
    return any(column.startswith(f"decoded/{name}/") for name in parts.per_box)


def as_output(columns: Columns, activation: Activation, grids: Sequence[tuple[int, int]]) -> DetectorOutput:
    """The teacher's output from the columns of a batch.

    Args:
        columns: as in [`as_columns`].
        activation: of the teacher's head.
        grids (`Sequence[tuple[int, int]]`): height and width of its encoder's maps in cells, for maps that are not
            stored; empty if they depend on the batch.
    """

    def layers_of(start: str) -> tuple[Predictions, ...]:
        numbers = sorted({int(n.removeprefix(start).split("/")[0]) for n in columns if n.startswith(start)})
        parts = [{p: _float(columns.get(f"{start}{number}/{p}")) for p in PREDICTED} for number in numbers]
        return tuple(Predictions(**cast(Any, part), activation=activation) for part in parts)

    def refuse(queries: ObjectQueries) -> tuple[Predictions, ...]:
        raise ValueError("A teacher whose answers are stored cannot be asked other queries.")

    fields = {n.removeprefix("queries/"): v for n, v in columns.items() if n.startswith("queries/")}
    queries = ObjectQueries(**{name: v.long() if name == "rows" else v.float() for name, v in fields.items()})
    requests = dict.fromkeys("/".join(name.split("/")[1:3]) for name in columns if name.startswith("decoded/"))
    decoded = {name: layers_of(f"decoded/{name}/") for name in requests}
    return DetectorOutput(layers_of("layers/"), queries, _maps(columns, grids), refuse, decoded=decoded)


def moved_columns(columns: Columns, placed: Tensor, activation: Activation, least: float) -> Columns:
    """The columns of one image in a view of it: places move with the image, and predictions whose box it does not show
    get no score.

    Args:
        columns: of one image, the queries along the first dimension.
        placed (`torch.Tensor` of shape `(4,)`): see [`~hf_detrkd.data.frame.Frame`].
        activation: of the teacher's head.
        least (`float`): share of a box that must be visible.
    """
    found, hidden = dict(columns), {}
    for name, values in columns.items():
        start, _, part = name.rpartition("/")
        if part in ("boxes", "class_boxes"):
            found[name], visible = moved(values.float(), placed)
            if part == "boxes":
                hidden[start] = (visible < least) | (visible <= 0)
        elif part == "points":
            found[name] = (placed[:2] + placed[2:] * values.float()).clamp(0, 1)
    for start, rows in hidden.items():
        if (logits := found.get(f"{start}/logits")) is not None:
            classes = logits.shape[-1] - (activation == "softmax")
            unseen = logits.clone()
            unseen[rows, :classes] = LOWEST
            found[f"{start}/logits"] = unseen
    return found


def _float(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float()


def _maps(columns: Columns, grids: Sequence[tuple[int, int]]) -> dict[str, tuple[FeatureMap, ...]]:
    """Feature maps by name; encoder maps that are not stored have no channels, but their size."""
    example = next(iter(columns.values()))
    empty = (FeatureMap(example.new_zeros(len(example), 0, *grid)) for grid in grids)
    found: dict[str, tuple[FeatureMap, ...]] = {"neck": (), "encoder": tuple(empty)}
    stored = {name.split("/")[1] for name in columns if name.startswith("features/")}
    for name in stored:
        levels = sorted(n for n in columns if n.startswith(f"features/{name}/"))
        found[name] = tuple(FeatureMap(columns[level].float()) for level in levels)
    return found
