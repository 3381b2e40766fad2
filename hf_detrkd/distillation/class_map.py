"""Maps the teacher's classes to the student's classes by label name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.text import read_yaml


@dataclass(frozen=True)
class ClassMap:
    """Mapping from the student's classes to the teacher's.

    Attributes:
        student (`tuple[str]`): student classes in index order.
        teacher (`tuple[str]`): teacher classes in index order.
        columns (`tuple[int | None]`): teacher index of each student class; `None` if the teacher lacks the class.
    """

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    columns: tuple[int | None, ...]

    @classmethod
    def match(
        cls, student: Sequence[str], teacher: Sequence[str], chosen: Mapping[str, str | None] | None = None
    ) -> ClassMap:
        """Pairs classes whose names are equal up to case and separators.

        Args:
            student, teacher (`Sequence[str]`): class names.
            chosen (`dict[str, str | None]`, *optional*): explicit pairs that override the names: student class to
                teacher class, or to `None` for no partner.

        Raises:
            ValueError: `chosen` contains an unknown class; a name fits several classes; no class has a partner.
        """
        chosen = chosen or {}
        for side, names, known in (("student", chosen, student), ("teacher", chosen.values(), teacher)):
            for name in names:
                if name is not None and name not in known:
                    near = difflib.get_close_matches(str(name), known, 1) or list(known)[:5]
                    raise ValueError(
                        f"The class map has an unknown {side} class {name!r}: did you mean {near[0]!r}?"
                        if len(near) == 1
                        else f"The class map has an unknown {side} class {name!r}: the classes are {near} ..."
                    )
        columns = tuple(_column(student, place, teacher, chosen) for place in range(len(student)))
        found = cls(tuple(student), tuple(teacher), columns)
        used = [column for column in found.columns if column is not None]
        for column in used:
            if used.count(column) > 1:
                takers = [name for name, c in zip(student, found.columns, strict=True) if c == column]
                raise ValueError(
                    f"The teacher class {teacher[column]!r} is mapped to several student classes, "
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
        """True if the teacher has the student's classes in the student's order."""
        return self.columns == tuple(range(len(self.teacher)))

    @property
    def is_complete(self) -> bool:
        """True if every student class has a partner."""
        return None not in self.columns

    def table(self) -> str:
        """The map as a text table, with the classes of either side that have no partner."""
        width = max(len("student"), *map(len, self.student)) + 2
        lines = [f"{'student':{width}}teacher"]
        for name, column in zip(self.student, self.columns, strict=True):
            partner = "- (ignored in class losses)" if column is None else self.teacher[column]
            lines.append(f"{name:{width}}{partner}")
        alone = [name for i, name in enumerate(self.teacher) if i not in self.columns]
        if alone:
            more = f" and {len(alone) - 10} more" if len(alone) > 10 else ""
            lines.append(f"Teacher classes without a partner: {', '.join(alone[:10])}{more}.")
        return "\n".join(lines)


def _column(
    student: Sequence[str], place: int, teacher: Sequence[str], chosen: Mapping[str, str | None]
) -> int | None:
    name = student[place]
    if name in chosen:
        partner = chosen[name]
        return None if partner is None else list(teacher).index(partner)
    if name in teacher:
        # Repeated names, such as COCO's "N/A", are paired in order.
        equal = [i for i, other in enumerate(teacher) if other == name]
        before = list(student[:place]).count(name)
        return equal[before] if before < len(equal) else None
    alike = [i for i, other in enumerate(teacher) if folded(other) == folded(name)]
    if len(alike) > 1:
        raise ValueError(
            f"The student class {name!r} fits several teacher classes, {[teacher[i] for i in alike]}: choose one "
            "with --class_map."
        )
    return alike[0] if alike else None


def folded(name: str) -> str:
    """Normalises a name: lower case, without spaces, hyphens, underscores and other separators."""
    return re.sub(r"[\W_]+", "", name.casefold())


def read_class_map(path: str | Path) -> dict[str, str | None]:
    """Reads `student class: teacher class` lines (null for none) from a YAML or JSON file.

    Raises:
        ValueError: the file does not exist or has another content.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--class_map must be a YAML or JSON file, but {path} does not exist.")
    content = read_yaml(file)
    if not isinstance(content, dict) or not all(isinstance(v, str | None) for v in content.values()):
        raise ValueError(
            f"{path} must hold `student class: teacher class` lines, or null for a class without partner."
        )
    return {str(name): partner for name, partner in content.items()}
