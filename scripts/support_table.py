"""Writes the README's table of what each method can do for each pair of families, from the code.

    python scripts/support_table.py README.md

It tries every method on every pair, as the trainer does at construction. A test keeps the README equal to it.
"""

import re
import sys
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from hf_detrkd import ADAPTERS, DETRDistill, DETRDistillConfig, KDDETRConfig
from hf_detrkd.adapters import spec_for
from hf_detrkd.methods import KDDETR
from hf_detrkd.outputs import DetectorSpec


START, END = "<!-- support table: scripts/support_table.py -->", "<!-- end of support table -->"
OFF = {"logits_weight": 0.0, "feature_weight": 0.0, "assignment_weight": 0.0}
PARTS = {
    "L": (DETRDistill, DETRDistillConfig(**OFF | {"logits_weight": 1.0})),
    "F": (DETRDistill, DETRDistillConfig(**OFF | {"feature_weight": 1.0})),
    "A": (DETRDistill, DETRDistillConfig(**OFF | {"assignment_weight": 1.0})),
    "S": (KDDETR, KDDETRConfig(general_points=0)),
    "G": (KDDETR, KDDETRConfig(specific_points=False)),
}
LEGEND = (
    "Rows are students, columns teachers; before the slash both are equally wide, after it not. DETRDistill: "
    "**L** matched logits, **F** features, **A** the teacher's queries as a prior. KD-DETR: **S** specific points, "
    "**G** general points. What is not listed is refused at construction, with the reason."
)


def configs(width: int) -> list[PreTrainedConfig]:
    """Every family in every form."""
    found = []
    for model_type in ADAPTERS:
        forms = [{}]
        if model_type == "deformable_detr":
            forms = [{}, {"with_box_refine": True}, {"with_box_refine": True, "two_stage": True}]
        widths = {"encoder_hidden_dim": width} if model_type == "rt_detr" else {}
        found += [AutoConfig.for_model(model_type, d_model=width, **widths, **form) for form in forms]
    return found


def possible(student: DetectorSpec, teacher: DetectorSpec) -> str:
    """The letters of the parts that this pair can do."""
    letters = ""
    for letter, (method, config) in PARTS.items():
        try:
            method(config, student, teacher)
        except ValueError:
            continue
        letters += letter
    return letters or "-"


def takes(spec: DetectorSpec) -> str:
    """The query fields that a family takes from outside."""
    return ", ".join(sorted(spec.query_fields))


def support_table() -> str:
    """The table as Markdown."""
    wide = [spec_for(config) for config in configs(256)]
    narrow = [spec_for(config) for config in configs(128)]
    lines = [LEGEND, "", "| | takes | " + " | ".join(spec.family for spec in wide) + " |"]
    lines.append("|---|---|" + "---|" * len(wide))
    for same, other in zip(wide, narrow, strict=True):
        cells = (f"{possible(same, teacher)} / {possible(other, teacher)}" for teacher in wide)
        lines.append(f"| **{same.family}** | {takes(same)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """A page with the table between its two marks."""
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{START}\n{support_table()}\n{END}", text)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text()))
