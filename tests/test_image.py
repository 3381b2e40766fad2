"""The Docker image: its base, and the files that pip gets."""

from __future__ import annotations

import fnmatch
import re

import pytest
from packaging.requirements import Requirement

from tests import ROOT


DOCKERFILE = (ROOT / "Dockerfile").read_text()


def requirements(text: str) -> dict[str, Requirement]:
    found = [Requirement(line) for line in text.split("\n") if line]
    return {requirement.name: requirement for requirement in found}


def test_the_base_has_a_pytorch_that_pip_keeps(settings: dict[str, dict[str, str]]) -> None:
    (version,) = re.findall(r"^FROM pytorch/pytorch:([\d.]+)-cuda[\d.]+-cudnn\d+-runtime$", DOCKERFILE, re.MULTILINE)
    assert requirements(settings["options"]["install_requires"])["torch"].specifier.contains(version)


def test_the_image_has_extras_and_a_command_of_this_package(settings: dict[str, dict[str, str]]) -> None:
    (extras,) = re.findall(r"'/source\[([\w,]+)\]'", DOCKERFILE)
    assert set(extras.split(",")) <= settings["options.extras_require"].keys()
    (command,) = re.findall(r'^ENTRYPOINT \["(.+)"\]$', DOCKERFILE, re.MULTILINE)
    assert f"{command} = " in settings["options.entry_points"]["console_scripts"]
    assert re.search(r"^USER [1-9]\d*$", DOCKERFILE, re.MULTILINE)  # not root


@pytest.mark.parametrize(
    "name", ["hf_detrkd", "scripts", "setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]
)
def test_the_build_sees_what_the_package_is_made_of(name: str) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*" and f"!{name}" in rules and (ROOT / name).exists()
    later = rules[rules.index(f"!{name}") + 1 :]
    assert not any(fnmatch.fnmatch(name, rule) for rule in later)
