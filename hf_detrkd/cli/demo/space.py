"""Writes the demo as a folder that is a Space of the Hub: its card, app, requirements, models and example images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import yaml

import hf_detrkd

from ...data.text import there
from .comparison import LoadedDetector


PYTHON = "3.12"  # a Space has 3.10 by default, which this package does not support
CARD = """---
{front_matter}---

# Object detection

The demo of [hf_detrkd](https://github.com/hf-detrkd/hf_detrkd): boxes, scores and latency of {titles} on an image.
"""
APP = '''"""Starts the demo."""

from hf_detrkd.cli.demo.main import main


main(
    [
{words}
    ]
)
'''
REQUIREMENTS = """# PyTorch without CUDA: delete this line on a Space with a GPU.
--extra-index-url https://download.pytorch.org/whl/cpu
hf-detrkd[demo]=={version}
"""


def check_free(folder: Path) -> None:
    """Refuses a folder with content.

    Raises:
        ValueError: the folder is a file or holds files.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"--space must be a new or empty folder, but {folder} has content.")


def write_space(folder: Path, detectors: Sequence[LoadedDetector], examples: Sequence[Path], threshold: float) -> None:
    """Writes the files of the Space. Detectors in local folders are copied into it, those of the Hub are named.

    Args:
        folder (`Path`): new or empty.
        detectors (`list[LoadedDetector]`): the teacher, if any, and the student.
        examples (`list[Path]`): image files, copied.
        threshold (`float`): the slider's first value.

    Raises:
        ValueError: see [`check_free`].
    """
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = [word for detector in detectors for word in _model_words(folder, detector)]
    if examples:
        (folder / "examples").mkdir()
        for file in examples:
            shutil.copy(file, folder / "examples" / file.name)
        words += ["--input", "examples"]
    words += ["--threshold", str(threshold)]
    titles = " and ".join(f"a {one.title.lower()}" for one in detectors)
    front_matter = yaml.safe_dump(_front_matter(detectors), sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(CARD.format(front_matter=front_matter, titles=titles), encoding="utf-8")
    lines = "\n".join(f"        {json.dumps(word)}," for word in words)
    (folder / "app.py").write_text(APP.format(words=lines), encoding="utf-8")
    (folder / "requirements.txt").write_text(REQUIREMENTS.format(version=hf_detrkd.__version__), encoding="utf-8")


def _front_matter(detectors: Sequence[LoadedDetector]) -> dict[str, object]:
    """The settings of the Space."""
    models = [one.name for one in detectors if not there(one.name)]
    return {
        "title": "Object detection",
        "emoji": "🔎",
        "colorFrom": "blue",
        "colorTo": "indigo",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": PYTHON,
        "app_file": "app.py",
        "pinned": False,
        **({"models": models} if models else {}),
    }


def _model_words(folder: Path, detector: LoadedDetector) -> list[str]:
    """The arguments of a detector in the Space; one in a local folder is saved into the Space first."""
    role = "teacher_" if detector.title == "Teacher" else ""
    if not there(detector.name):
        return [f"--{role}model_name_or_path", detector.name, f"--{role}model_revision", detector.revision]
    place = detector.title.lower()
    detector.model.save_pretrained(folder / place)
    detector.processor.save_pretrained(folder / place)
    return [f"--{role}model_name_or_path", place]
