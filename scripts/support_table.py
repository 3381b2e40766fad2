"""Generates the table of supported pairs in docs/models.md of methods and pairs of families from the code.

    python scripts/support_table.py docs/models.md

It constructs every method for every pair, as the trainer does. A test checks that the page is up to date.
"""

import re
import sys
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from hf_detrkd.adapters import ADAPTERS, spec_for
from hf_detrkd.methods import (
    KDDETR,
    CLoCKDistill,
    CLoCKDistillConfig,
    DETRDistill,
    DETRDistillConfig,
    KDDETRConfig,
    TaskAdaptiveConfig,
    TaskAdaptiveRegularization,
)
from hf_detrkd.structures.outputs import DetectorSpec


START, END = "<!-- support table: scripts/support_table.py -->", "<!-- end of support table -->"
OFF = {"logits_weight": 0.0, "feature_weight": 0.0, "assignment_weight": 0.0}
PARTS = {
    "L": (DETRDistill, DETRDistillConfig(**OFF | {"logits_weight": 1.0})),
    "F": (DETRDistill, DETRDistillConfig(**OFF | {"feature_weight": 1.0})),
    "A": (DETRDistill, DETRDistillConfig(**OFF | {"assignment_weight": 1.0})),
    "S": (KDDETR, KDDETRConfig(general_points=0)),
    "G": (KDDETR, KDDETRConfig(specific_points=False)),
    "M": (CLoCKDistill, CLoCKDistillConfig(target_queries_weight=0.0)),
    "Q": (CLoCKDistill, CLoCKDistillConfig(memory_weight=0.0)),
    "N": (TaskAdaptiveRegularization, TaskAdaptiveConfig(proposals=False)),
    "R": (TaskAdaptiveRegularization, TaskAdaptiveConfig()),
}
PROPOSALS = "task_adaptive_class"  # the loss of R, which students without proposals do not have
LEGEND = (
    "Rows are students, columns teachers; before the slash both are equally wide, after it not. DETRDistill: "
    "**L** matched logits, **F** features, **A** the teacher's queries as a prior. KD-DETR: **S** specific points, "
    "**G** general points. CLoCKDistill: **M** memory, **Q** queries from the ground truth. Task-adaptive: "
    "**N** features, **R** the student's proposals. Unsupported combinations raise a `ValueError` at construction."
)


def configs(width: int) -> list[PreTrainedConfig]:
    """A config for every family in every variant."""
    found = []
    for model_type in ADAPTERS:
        forms = [{}]
        if model_type == "deformable_detr":
            forms = [{}, {"with_box_refine": True}, {"with_box_refine": True, "two_stage": True}]
        fields: dict[str, object] = {"hidden_size" if model_type in ("dab-detr", "yolos") else "d_model": width}
        if model_type in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2"):
            fields["encoder_hidden_dim"] = width
        if model_type == "lw_detr":
            fields["projector_scale_factors"] = [1.0]
        if model_type == "faster_rcnn":
            fields = {"backbone": "resnet18", "fpn_channels": width, "representation_size": width}
        found += [AutoConfig.for_model(model_type, **fields, **form) for form in forms]
    return found


def possible(student: DetectorSpec, teacher: DetectorSpec) -> str:
    """The letters of the parts that this pair supports."""
    letters = ""
    for letter, (method, config) in PARTS.items():
        try:
            weights = method(config, student, teacher).weights
        except ValueError:
            continue
        letters += letter if letter != "R" or PROPOSALS in weights else ""
    return letters or "-"


def takes(spec: DetectorSpec) -> str:
    """The query fields that a family accepts as input."""
    return ", ".join(sorted(spec.query_fields)) or "none"


def groups_of(cells: dict[tuple[str, str], str], families: list[str]) -> dict[str, list[str]]:
    """Families with identical rows and columns, grouped by the first of each group."""
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name in families:
        key = tuple((cells[name, other], cells[other, name]) for other in families)
        groups.setdefault(key, []).append(name)
    return {group[0]: group for group in groups.values()}


def support_table() -> str:
    """The table as Markdown."""
    wide = {spec.family: spec for spec in map(spec_for, configs(256))}
    narrow = {spec.family: spec for spec in map(spec_for, configs(128))}
    cells = {
        (name, teacher): f"{possible(wide[name], wide[teacher])} / {possible(narrow[name], wide[teacher])}"
        for name in wide
        for teacher in wide
    }
    groups = groups_of(cells, list(wide))
    lines = [LEGEND, "", "| student | takes | " + " | ".join(", ".join(group) for group in groups.values()) + " |"]
    lines.append("|---|---|" + "---|" * len(groups))
    for first, group in groups.items():
        row = " | ".join(cells[first, teacher] for teacher in groups)
        fields = " or ".join(dict.fromkeys(takes(wide[name]) for name in group))
        lines.append(f"| **{', '.join(group)}** | {fields} | {row} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """A page with the table between its two markers."""
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{START}\n{support_table()}\n{END}", text)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text()))
