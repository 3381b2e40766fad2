"""Initialises a student with the matching weights of its teacher."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters import adapter_for, class_names
from .student import with_classes


LAYER = re.compile(
    r"^(?P<before>.*?\b(?:layers|vit\.encoder\.layer|class_embed|bbox_embed|lqe_layers)\.)(?P<index>\d+)(?P<behind>\..*)$"
)
CONSTANTS = ("decoder.up", "decoder.reg_scale")  # D-FINE's bins, which the config defines


@dataclass(frozen=True)
class Inherited:
    """Result of [`init_from_teacher`].

    Attributes:
        copied (`dict[str, str]`): student tensor to the teacher tensor that it was copied from.
        left (`dict[str, str]`): student tensor that was not copied, to the reason.
    """

    copied: dict[str, str]
    left: dict[str, str]

    def summary(self) -> str:
        """One paragraph: the number of copied tensors, and the parts that were not copied with the reason."""
        parts: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            parts.setdefault(reason, []).append(re.sub(r"\.\d+\..*|\.(weight|bias).*", "", name))
        why = "; ".join(f"{reason}: {', '.join(sorted(set(names)))}" for reason, names in parts.items())
        return f"{len(self.copied)} of {len(self.copied) + len(self.left)} tensors were copied from the teacher" + (
            f". Not copied: {why}." if why else "."
        )


@torch.no_grad()
def init_from_teacher(student: PreTrainedModel, teacher: PreTrainedModel) -> Inherited:
    """Copies the teacher's tensors that match in name and shape into a student: backbone, encoder, decoder, heads.

    If the layer counts differ, evenly spaced layers are copied, always including the last one (student layer s of L
    takes teacher layer ceil(s * L_T / L)). A backbone is copied whole or not at all. Class rows are matched by class
    name; those of classes that the teacher does not know stay newly initialised.

    Args:
        student ([`~transformers.PreTrainedModel`]): changed in place.
        teacher ([`~transformers.PreTrainedModel`])

    Returns:
        [`Inherited`]: the copied tensors, and the others with the reason.

    Raises:
        ValueError: no tensor matches.
    """
    own = student.state_dict()
    theirs = with_classes(teacher, class_names(student.config)).state_dict()
    prefix = adapter_for(student).backbone_prefix
    # If the backbone is the whole model (YOLOS), its layers are matched like those of an encoder.
    backbone = {n: n for n in own if n.startswith(prefix)} if prefix != f"{student.base_model_prefix}." else {}
    sources = {name: _matching_layer(name, own, theirs) for name in own} | backbone
    left = {name: reason for name, source in sources.items() if (reason := _misfit(source, own[name], theirs))}
    deeper = backbone and backbone.keys() != {name for name in theirs if name.startswith(prefix)}
    if deeper or any(name in left for name in backbone):
        left |= dict.fromkeys(backbone, "the backbone differs")
    copied = {name: source for name, source in sources.items() if name not in left}
    if all(own[name].ndim < 2 for name in copied):
        raise ValueError(
            f"No tensor of the {teacher.config.model_type} teacher fits the {student.config.model_type} student: "
            "disable init_from_teacher, or choose a student of the same family and width."
        )
    for name, source in copied.items():
        own[name].copy_(theirs[source])
    return Inherited(copied, left)


def _misfit(source: str, value: Tensor, theirs: dict[str, Tensor]) -> str | None:
    """Reason why a tensor cannot be copied from the teacher's tensor `source`, or `None`."""
    if source not in theirs:
        return "missing in the teacher"
    if source.endswith(CONSTANTS):
        return "a constant of its config"
    return None if theirs[source].shape == value.shape else "the shape differs"


def _matching_layer(name: str, own: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """Name of the teacher tensor for a student tensor: the same name with the layer number mapped."""
    found = LAYER.match(name)
    if found is None:
        return name
    counts = [_count(found["before"], tensors) for tensors in (own, theirs)]
    if 0 in counts:
        return name
    index = -(-(int(found["index"]) + 1) * counts[1] // counts[0]) - 1  # ceil((s + 1) * L_T / L) - 1
    return f"{found['before']}{index}{found['behind']}"


def _count(before: str, tensors: dict[str, Tensor]) -> int:
    pattern = re.compile(re.escape(before) + r"(\d+)\.")
    return len({match[1] for match in map(pattern.match, tensors) if match})
