"""What a student starts from besides its own weights, and which of its layers stay as they are."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .adapters import adapter_for, class_names


LAYER = re.compile(r"^(?P<before>.*?\b(?:layers|class_embed|bbox_embed|lqe_layers)\.)(?P<index>\d+)(?P<behind>\..*)$")
ROOT = r"(?:conv_encoder\.)?(?:model\.)?"
STEM = ROOT + r"(?:embedder|conv1|bn1|stem)\."
STAGE = ROOT + r"(?:encoder\.stages\.{place}|stages[._]{place}|layer{number})\."


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
    teacher layer ceil(s * L_T / L)). Heads of classes are copied where both have the same classes in one order.

    Args:
        student ([`~transformers.PreTrainedModel`]): changed in place.
        teacher ([`~transformers.PreTrainedModel`])

    Returns:
        [`Inherited`]: what was copied, and what was not and why.

    Raises:
        ValueError: nothing fits.
    """
    own, theirs = student.state_dict(), teacher.state_dict()
    same_classes = class_names(student.config) == class_names(teacher.config)
    of_classes = set() if same_classes else _class_tensors(student, theirs)
    copied, left = {}, {}
    for name, value in own.items():
        source = _matching_layer(name, own, theirs)
        if source not in theirs:
            left[name] = "the teacher has none"
        elif name in of_classes:
            left[name] = "the classes differ"
        elif theirs[source].shape != value.shape:
            left[name] = "of another shape"
        else:
            copied[name] = source
    if all(own[name].ndim < 2 for name in copied):
        raise ValueError(
            f"Nothing of the {teacher.config.model_type} teacher fits the {student.config.model_type} student: leave "
            "init_from_teacher out, or choose a student of the same family and width."
        )
    for name, source in copied.items():
        own[name].copy_(theirs[source])
    return Inherited(copied, left)


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


def _class_tensors(student: PreTrainedModel, theirs: dict[str, Tensor]) -> set[str]:
    """Tensors with a row per class, whose rows would go to the wrong classes."""
    words = ("class", "score")
    return {name for name in student.state_dict() if any(word in name for word in words) and name in theirs}


def freeze_stages(model: PreTrainedModel, number: int) -> list[str]:
    """Freezes the stem and the first stages of a backbone, whichever library it is from.

    Args:
        model ([`~transformers.PreTrainedModel`]): a detector.
        number (`int`): 0 freezes nothing, 1 the stem, 2 the stem and the first stage (DETR and its line, with trained
            backbones), and so on.

    Returns:
        `list[str]`: names of the frozen parameters.

    Raises:
        ValueError: a backbone without such stages.
    """
    adapter = adapter_for(model)
    parameters = [(n.removeprefix(adapter.backbone_prefix), n, p) for n, p in adapter.backbone_parameters()]
    frozen: list[str] = []
    for part in range(number):
        pattern = STEM if part == 0 else STAGE.format(place=part - 1, number=part)
        found = [(name, parameter) for short, name, parameter in parameters if re.match(pattern, short)]
        if not found:
            raise ValueError(
                f"freeze_stages is {number}, but the backbone of this {model.config.model_type} has no part {part} "
                f"(0 is the stem): its names look like {parameters[0][0]!r}. Use freeze with patterns instead."
            )
        for name, parameter in found:
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen
