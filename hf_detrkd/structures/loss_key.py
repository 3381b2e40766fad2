"""Loss names with access to their parts: method, part, group and layer."""

from __future__ import annotations

from typing import Any


GRADIENT_SUFFIX = "_gradient"
"""End of the names by which gradient norms of terms, relative to the task's, are logged."""


class LossKey(str):
    """Name of a loss: the string `<method>_<part>[_<group>][_<layer>]` with its parts as attributes.

    The string is the key in loss dictionaries, the column name in the log and the name that `--loss_weights` takes.

    Args:
        method (`str`): name of the distillation method, or `task` for the detection loss.
        part (`str`): compared quantity, for example `class` or `box`.
        group (`str`, *optional*): group of queries, for example `general`.
        layer (`int`, *optional*): decoder layer or feature level of the student.

    Example:
        ```python
        >>> key = LossKey("kd_detr", "class", "general", 2)
        >>> key, key.term
        ('kd_detr_class_general_2', 'kd_detr_class_general')
        ```
    """

    method: str
    part: str
    group: str | None
    layer: int | None

    def __new__(cls, method: str, part: str, group: str | None = None, layer: int | None = None) -> LossKey:
        pieces = [method, part, *([group] if group else []), *([] if layer is None else [str(layer)])]
        key = super().__new__(cls, "_".join(pieces))
        key.method, key.part, key.group, key.layer = method, part, group or None, layer
        return key

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.method, self.part, self.group, self.layer

    @property
    def term(self) -> LossKey:
        """This key without the layer."""
        return LossKey(self.method, self.part, self.group)

    def at(self, layer: int) -> LossKey:
        """The key of this term for one layer."""
        return LossKey(self.method, self.part, self.group, layer)

    @property
    def readable(self) -> str:
        """Form for messages: `kd_detr_class_general, layer 2`."""
        return str(self) if self.layer is None else f"{self.term}, layer {self.layer}"
