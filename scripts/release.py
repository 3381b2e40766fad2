"""Rehearses a release: checks version, changelog and tag, builds the packages, and installs the wheel by itself.

    make release

Uploads nothing and tags nothing; prints the steps that are left to a person. It needs the packages build and twine,
which `make release` installs.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
LEFT = """{version} is ready. What is left to a person:
  1. See that the checks of this commit have passed on GitHub.
  2. git tag -a v{version} -m v{version} && git push origin v{version}
     The workflow release.yml then tests again, uploads to PyPI and publishes the release with the changelog's section.
  3. pip install hf-detrkd=={version} in a new environment, and hf-detrkd distill --config quickstart.
  4. Announce it, with the changelog's section."""


def version_of(root: Path) -> str:
    text = (root / "hf_detrkd" / "__init__.py").read_text()
    return re.findall(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)[0]


def section_of(changelog: str, name: str) -> str:
    """The text under a heading of the changelog such as `[0.1.0]`; empty if there is none."""
    found = re.search(rf"^## \[{re.escape(name)}\].*\n((?:(?!## \[|\[).*\n?)*)", changelog, flags=re.MULTILINE)
    return found[1].strip() if found else ""


def problems_of(root: Path) -> list[str]:
    """What has to be done before this version can be released."""
    version, changelog = version_of(root), (root / "CHANGELOG.md").read_text()
    problems = []
    if not section_of(changelog, version):
        problems.append(f"CHANGELOG.md needs a section [{version}] with its changes.")
    if section_of(changelog, "Unreleased"):
        problems.append(
            "CHANGELOG.md has changes under [Unreleased]: move them to the section of a new version, which "
            f"hf_detrkd/__init__.py names ({version} now)."
        )
    if f"\n[{version}]: " not in changelog:
        problems.append(f"CHANGELOG.md needs a link [{version}] at its end.")
    if f"\nversion: {version}\n" not in (root / "CITATION.cff").read_text():
        problems.append(f"CITATION.cff must name the version {version}.")
    if git(root, "status", "--porcelain"):
        problems.append("The working tree must be clean: commit or remove the changes that `git status` lists.")
    tagged = git(root, "rev-parse", "--verify", "--quiet", f"v{version}^{{commit}}")
    if tagged and tagged != git(root, "rev-parse", "HEAD"):
        problems.append(f"The tag v{version} names another commit: choose a new version.")
    return problems


def git(root: Path, *words: str) -> str:
    """What a git command prints; empty if it fails."""
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()


def build(root: Path) -> Path:
    """Builds sdist and wheel into `dist/`, checks how PyPI will show them, and returns the wheel."""
    for folder in ("dist", "build"):
        shutil.rmtree(root / folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build"], cwd=root, check=True)
    files = sorted((root / "dist").iterdir())
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, files)], check=True)
    return next(file for file in files if file.suffix == ".whl")


def try_wheel(wheel: Path, version: str) -> None:
    """Installs the wheel without its dependencies into a new environment that borrows those of this one, and runs it.

    Path files of the borrowed folder do not count there, so that an editable install of the checkout is not found.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": folder, "platbase": folder}))
        (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        code = (
            "import hf_detrkd, pathlib\n"
            f"assert pathlib.Path(hf_detrkd.__file__).is_relative_to({folder!r}), hf_detrkd.__file__\n"
            f"assert hf_detrkd.__version__ == {version!r}, hf_detrkd.__version__\n"
            "for name in hf_detrkd.__all__: getattr(hf_detrkd, name)\n"
        )
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        for words in ([python, "-c", code], [python.with_name("hf-detrkd"), "recipes"]):
            subprocess.run(words, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    problems = problems_of(ROOT)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    version = version_of(ROOT)
    try_wheel(build(ROOT), version)
    print(LEFT.format(version=version))
    return 0


if __name__ == "__main__":
    sys.exit(main())
