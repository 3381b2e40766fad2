"""What the README says is so."""

from __future__ import annotations

import re
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import distill  # noqa: E402
import support_table  # noqa: E402


README = (ROOT / "README.md").read_text()


def test_the_table_of_pairs_is_what_the_code_does() -> None:
    assert support_table.with_table(README) == README
    table = README.split(support_table.START)[1].split(support_table.END)[0]
    assert all(table.count(family) == 2 for family in ("table-transformer", "conditional_detr", "rf_detr", "yolos"))


def test_every_command_parses_and_every_file_exists() -> None:
    text = README.replace("\\\n", " ")
    commands = re.findall(r"^ {4}(?:accelerate launch|python) scripts/(\S+\.py)(.*)$", text, flags=re.MULTILINE)
    assert len(commands) >= 4
    for script, arguments in commands:
        assert (ROOT / "scripts" / script).is_file()
        for word in arguments.split():
            assert not word.startswith("scripts/") or (ROOT / word).exists(), word
        if script == "distill.py":
            distill.parse([w for w in arguments.split() if w != "--bf16"])
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_make_knows_the_commands_that_the_readme_names() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^ {4})make ([a-z]+)", README, flags=re.MULTILINE))
    assert {"demo", "test", "help"} <= named <= targets
