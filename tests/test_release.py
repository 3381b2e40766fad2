"""`make release` refuses what is not ready."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import ROOT, script


release = script("release")
CHANGELOG = """# Changelog

## [Unreleased]

## [0.2.0] - 2027-01-01

### Added

- A thing.

## [0.1.0] - 2026-11-22

- Another.

[Unreleased]: https://x/compare
[0.2.0]: https://x/releases/tag/v0.2.0
[0.1.0]: https://x/releases/tag/v0.1.0
"""


def git(root: Path, *words: str) -> None:
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *author, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A repository that can be released."""
    (tmp_path / "hf_detrkd").mkdir()
    (tmp_path / "hf_detrkd" / "__init__.py").write_text('"""Doc."""\n\n__version__ = "0.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 0.2.0\n")
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def commit(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", "x")


def test_a_version_that_is_everywhere_is_ready(ready: Path) -> None:
    assert release.problems_of(ready) == []
    git(ready, "tag", "v0.2.0")
    assert release.problems_of(ready) == []


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        ("CHANGELOG.md", "## [Unreleased]\n", "## [Unreleased]\n\n- New.\n", "has changes under [Unreleased]"),
        ("CHANGELOG.md", "### Added\n\n- A thing.\n", "", "needs a section [0.2.0]"),
        ("CHANGELOG.md", "\n[0.2.0]: https://x/releases/tag/v0.2.0", "", "needs a link [0.2.0]"),
        ("CITATION.cff", "\nversion: 0.2.0", "\nversion: 0.1.0", "CITATION.cff must name the version 0.2.0"),
    ],
)
def test_a_version_that_is_missing_somewhere_is_refused(
    ready: Path, file: str, old: str, new: str, message: str
) -> None:
    text = (ready / file).read_text()
    assert old in text
    (ready / file).write_text(text.replace(old, new))
    commit(ready)
    (problem,) = release.problems_of(ready)
    assert message in problem


def test_another_commit_with_the_tag_and_changes_without_a_commit_are_refused(ready: Path) -> None:
    git(ready, "tag", "v0.2.0")
    commit(ready)
    (ready / "new.txt").write_text("x")
    clean, tag = release.problems_of(ready)
    assert "must be clean" in clean and "The tag v0.2.0 names another commit" in tag


def test_this_repository_has_one_version() -> None:
    version, changelog = release.version_of(ROOT), (ROOT / "CHANGELOG.md").read_text()
    assert release.section_of(changelog, version)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
