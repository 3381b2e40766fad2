"""Griffe extension that reads this package's docstrings: Hugging Face's form, and help texts of dataclass fields."""

from __future__ import annotations

import ast
import re
from typing import Any

from griffe import Attribute, Docstring, Expr, ExprCall, ExprDict, ExprKeyword, Extension, Object


ITEM = re.compile(
    r"""^(?P<indent>\ +) (?P<names>[\w*]+ (?:,\ [\w*]+)*) \ \( (?P<type>[^:\n]*[`*][^:\n]*) \)
    (?P<text>(?::.*)? (?:\n(?P=indent)\ +.*)*)$""",
    re.MULTILINE | re.VERBOSE,
)
ERROR = re.compile(r"^( +)`(\w+Error)`:", re.MULTILINE)
REFERENCE = re.compile(r"\[`(?:~[\w.]*\.)?([\w.]+)`\](?![\[(])")


class Docstrings(Extension):
    """Rewrites docstrings into the form that Griffe's Google parser reads."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = in_google_form(obj.docstring.value)

    def on_attribute_instance(self, *, attr: Attribute, **kwargs: Any) -> None:
        """Gives `name: type = field(default=value, metadata={"help": text})` that value and that docstring."""
        if not isinstance(attr.value, ExprCall) or str(attr.value.function) != "field":
            return
        given = {keyword.name: keyword.value for keyword in attr.value.arguments if isinstance(keyword, ExprKeyword)}
        metadata = given.get("metadata")
        if isinstance(metadata, ExprDict) and attr.docstring is None:
            entries = dict(zip(map(str, metadata.keys), metadata.values, strict=True))
            help_text = text_of(entries.get("'help'"))
            attr.docstring = Docstring(help_text, parent=attr) if help_text else None
        attr.value = given.get("default", attr.value)


def in_google_form(text: str) -> str:
    """One item for every parameter, types without markup, and references as code."""
    return REFERENCE.sub(r"`\1`", ERROR.sub(r"\1\2:", ITEM.sub(items, text)))


def items(found: re.Match[str]) -> str:
    kind = REFERENCE.sub(r"\1", found["type"]).replace("*", "").replace("`", "")
    kind = re.sub(r"(^|, )optional.*", "", kind)
    described = f" ({kind})" if kind else ""
    names = found["names"].split(", ")
    return "\n".join(f"{found['indent']}{name}{described}{found['text'] or ':'}" for name in names)


def text_of(value: str | Expr | None) -> str:
    """The text of a string in the source; what an f-string computes is shown as `...`."""
    if value is None:
        return ""
    parsed = ast.parse(str(value), mode="eval").body
    parts = parsed.values if isinstance(parsed, ast.JoinedStr) else [parsed]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts)
