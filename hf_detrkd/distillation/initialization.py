"""What a student starts from besides its own weights, and which of its layers stay as they are."""

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
CONSTANTS = ("decoder.up", "decoder.reg_scale")  # D-FINE's bins, which belong to the config


@dataclass(frozen=True)
class Inherited:
    """What [`init_from_teacher`] did.

    Attributes:
        copied (`dict[str, str]`): the student's tensors and the teacher's that they were copied from.
        left (`dict[str, str]`): tensors that start anew, and why.
    """

    copied: dict[str, str]
    left: dict[str, str]

    def summary(self) -> str:
        """One paragraph: how many tensors, and the parts that start anew with the reason."""
        parts: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            parts.setdefault(reason, []).append(re.sub(r"\.\d+\..*|\.(weight|bias).*", "", name))
        why = "; ".join(f"{reason}: {', '.join(sorted(set(names)))}" for reason, names in parts.items())
        return f"{len(self.copied)} of {len(self.copied) + len(self.left)} tensors are the teacher's" + (
            f". New are, {why}." if why else "."
        )


@torch.no_grad()
def init_from_teacher(student: PreTrainedModel, teacher: PreTrainedModel) -> Inherited:
    """Copies into a student what fits of its teacher, by name and shape: backbone, encoder, decoder, heads.

    Where the student has fewer layers, it takes evenly spaced ones, the last one always (student layer s of L takes
    teacher layer ceil(s * L_T / L)). A backbone is copied whole or not at all. Rows of classes follow the classes'
    names; classes that the teacher does not know start anew.

    Args:
        student ([`~transformers.PreTrainedModel`]): changed in place.
        teacher ([`~transformers.PreTrainedModel`])

    Returns:
        [`Inherited`]: what was copied, and what was not and why.

    Raises:
        ValueError: nothing fits.
    """
    own = student.state_dict()
    theirs = with_classes(teacher, class_names(student.config)).state_dict()
    prefix = adapter_for(student).backbone_prefix
    # Where the backbone is the whole model (YOLOS), its layers are like an encoder's.
    backbone = {n: n for n in own if n.startswith(prefix)} if prefix != f"{student.base_model_prefix}." else {}
    sources = {name: _matching_layer(name, own, theirs) for name in own} | backbone
    left = {name: reason for name, source in sources.items() if (reason := _misfit(source, own[name], theirs))}
    deeper = backbone and backbone.keys() != {name for name in theirs if name.startswith(prefix)}
    if deeper or any(name in left for name in backbone):
        left |= dict.fromkeys(backbone, "the backbone is another")
    copied = {name: source for name, source in sources.items() if name not in left}
    if all(own[name].ndim < 2 for name in copied):
        raise ValueError(
            f"Nothing of the {teacher.config.model_type} teacher fits the {student.config.model_type} student: leave "
            "init_from_teacher out, or choose a student of the same family and width."
        )
    for name, source in copied.items():
        own[name].copy_(theirs[source])
    return Inherited(copied, left)


def _misfit(source: str, value: Tensor, theirs: dict[str, Tensor]) -> str | None:
    """Why a tensor cannot be copied from this one of the teacher's."""
    if source not in theirs:
        return "the teacher has none"
    if source.endswith(CONSTANTS):
        return "a constant of its config"
    return None if theirs[source].shape == value.shape else "of another shape"


def _matching_layer(name: str, own: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """The teacher's name of a student's tensor: the same, but for the number of its layer."""
    found = LAYER.match(name)
    if found is None:
        return name
    counts = [_count(found["before"], tensors) for tensors in (own, theirs)]
    if 0 in counts:
        return name
    index = -(-(int(found["index"]) + 1) * counts[1] // counts[0]) - 1
    return f"{found['before']}{index}{found['behind']}"


def _count(before: str, tensors: dict[str, Tensor]) -> int:
    pattern = re.compile(re.escape(before) + r"(\d+)\.")
    return len({match[1] for match in map(pattern.match, tensors) if match})
