"""Which of a teacher's classes is which of the student's, by the names of their labels."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class ClassMap:
    """The teacher's class for each of the student's.

    Attributes:
        student (`tuple[str]`): the student's classes in its order.
        teacher (`tuple[str]`): the teacher's in its own.
        columns (`tuple[int | None]`): for each of the student's classes the teacher's index; `None` where it has none.
    """

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    columns: tuple[int | None, ...]

    @classmethod
    def match(
        cls, student: Sequence[str], teacher: Sequence[str], chosen: Mapping[str, str | None] | None = None
    ) -> ClassMap:
        """Pairs classes whose names are equal but for case and separators.

        Args:
            student, teacher (`Sequence[str]`): class names.
            chosen (`dict[str, str | None]`, *optional*): pairs that win over the names: a class of the student and the
                teacher's for it, or `None` for none.

        Raises:
            ValueError: `chosen` names a class that is none; a name fits several classes; no class has a partner.
        """
        chosen = chosen or {}
        for side, names, known in (("student", chosen, student), ("teacher", chosen.values(), teacher)):
            for name in names:
                if name is not None and name not in known:
                    near = difflib.get_close_matches(str(name), known, 1) or list(known)[:5]
                    raise ValueError(
                        f"The class map names the {side}'s class {name!r}, which has none: did you mean {near[0]!r}?"
                        if len(near) == 1
                        else f"The class map names the {side}'s class {name!r}, but its classes are {near} ..."
                    )
        columns = tuple(_column(student, place, teacher, chosen) for place in range(len(student)))
        found = cls(tuple(student), tuple(teacher), columns)
        used = [column for column in found.columns if column is not None]
        for column in used:
            if used.count(column) > 1:
                takers = [name for name, c in zip(student, found.columns, strict=True) if c == column]
                raise ValueError(
                    f"The teacher's class {teacher[column]!r} would answer for several classes of the student, "
                    f"{takers}: choose one with --class_map and map the others to null."
                )
        if not used:
            raise ValueError(
                "The teacher knows none of the student's classes. Give --class_map, a YAML or JSON file of "
                f"`student class: teacher class`, or another teacher.\n{found.table()}"
            )
        return found

    @property
    def is_identity(self) -> bool:
        """Whether the teacher has the student's classes in the student's order."""
        return self.columns == tuple(range(len(self.teacher)))

    @property
    def is_complete(self) -> bool:
        """Whether every class of the student has a partner."""
        return None not in self.columns

    def table(self) -> str:
        """The map as text, with the classes of either side that have no partner."""
        width = max(len("student"), *map(len, self.student)) + 2
        lines = [f"{'student':{width}}teacher"]
        for name, column in zip(self.student, self.columns, strict=True):
            partner = "- (left out of class terms)" if column is None else self.teacher[column]
            lines.append(f"{name:{width}}{partner}")
        alone = [name for i, name in enumerate(self.teacher) if i not in self.columns]
        if alone:
            more = f" and {len(alone) - 10} more" if len(alone) > 10 else ""
            lines.append(f"The teacher's classes without a partner: {', '.join(alone[:10])}{more}.")
        return "\n".join(lines)


def _column(
    student: Sequence[str], place: int, teacher: Sequence[str], chosen: Mapping[str, str | None]
) -> int | None:
    name = student[place]
    if name in chosen:
        partner = chosen[name]
        return None if partner is None else list(teacher).index(partner)
    if name in teacher:
        # COCO's "N/A" stands for many classes: the first is the first.
        equal = [i for i, other in enumerate(teacher) if other == name]
        before = list(student[:place]).count(name)
        return equal[before] if before < len(equal) else None
    alike = [i for i, other in enumerate(teacher) if folded(other) == folded(name)]
    if len(alike) > 1:
        raise ValueError(
            f"The student's class {name!r} fits several of the teacher's, {[teacher[i] for i in alike]}: choose one "
            "with --class_map."
        )
    return alike[0] if alike else None


def folded(name: str) -> str:
    """A name without case, spaces, hyphens, underscores and other separators."""
    return re.sub(r"[\W_]+", "", name.casefold())


def read_class_map(path: str | Path) -> dict[str, str | None]:
    """Reads `student class: teacher class` lines (null for none) from a YAML or JSON file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--class_map must be a YAML or JSON file, but {path} does not exist.")
    content = yaml.safe_load(file.read_text())
    if not isinstance(content, dict) or not all(isinstance(v, str | None) for v in content.values()):
        raise ValueError(
            f"{path} must hold `student class: teacher class` lines, or null for a class without partner."
        )
    return {str(name): partner for name, partner in content.items()}
