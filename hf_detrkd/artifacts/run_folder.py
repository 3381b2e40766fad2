"""The files of a run's output folder and a reader for them, used by the card, the report and the push."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..data.text import read_yaml, there
from .redaction import under_home
from .run_kinds import FACT_KINDS, MODELS, checked
from .whole_checkpoints import checkpoints_of
from .whole_files import write_whole


RECIPE = "recipe.yaml"  # the arguments that repeat the run
FACTS = "run.json"  # data set, method, teacher, command, device, versions
SUMMARY = "summary.json"  # one row for each model
PRECISION = "precision.json"  # precision over recall, by model and class
RESULTS = "all_results.json"
STATE = "trainer_state.json"
SEEN = 60  # images that are searched for failures to draw
CONTROL = "control"  # subfolder of the run without a teacher


@dataclass(frozen=True)
class Run:
    """The files of an output folder; what was not measured is missing, not zero.

    Attributes:
        folder (`Path`)
        facts (`dict`): `dataset_name`, `train_split`, `eval_split`, `train_images`, `eval_images`, `classes` (names),
            `unlabeled_images` (of the training; missing if there are none), `streamed` (true for a training set
            without a known number of images),
            `image_size` (height and width in pixels), `method` (as on the command line; `none` without), `methods` (a
            list of their names), `papers` (of the methods: `title`, `arxiv`, `citation`), `teacher`
            (`name`, `source`: `hub`, `folder` or `memory`, `revision`; or `None`), `base_model` (Hub id or `None`),
            `command`, `arguments` (by name), `device` (its name), `processes`, `batch_size` (of all
            of them), `mixed_precision`, `versions` (by package), `seed`, `steps` (trained), `family` (model type),
            `hub_dataset` (Hub id or `None`), `hub` (`repo_id`, `private`, `revision`, `strategy`; or `None`), `card`
            (`license`, `language`, `tags`, `title`).
        models (`dict[str, dict]`): rows of the table in its order, of `teacher` (`teacher 1`, ... of several),
            `control`, and `distilled` (`student` for a run without a method). Each holds `map`, `map_50`, `map_75` in
            [0, 1], `parameters`, `seconds_per_step`, `gflops`, `classes` (AP by class name, `None` for a class without
            objects), `latency` (by batch size as text: `median_ms`, `low_ms`, `high_ms`, `images_per_second`),
            `image_size` and `precision` of these measurements; unmeasured ones are `None` or missing.
        recipe (`dict`): the run's arguments.
        results (`dict[str, float]`): metrics of the last evaluation and of the training.
        histories (`dict[str, list[dict]]`): log history of `Trainer`, by model (`control`, `distilled` or `student`).
        precision (`dict[str, dict[str, dict[str, list[float]]]]`): by model, then `50` or `75` (IoU in percent), then
            class: precision at the recalls 0, 0.01, ..., 1.
    """

    folder: Path
    facts: dict[str, Any]
    models: dict[str, dict[str, Any]]
    recipe: dict[str, Any]
    results: dict[str, float]
    histories: dict[str, list[dict[str, Any]]]
    precision: dict[str, dict[str, dict[str, list[float]]]]

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """
        Raises:
            ValueError: the folder is not that of a finished run.
        """
        folder = Path(folder)
        if not (folder / SUMMARY).is_file():
            raise ValueError(f"{folder} must be the output folder of a finished run, but holds no {SUMMARY}.")
        models = checked(read_json(folder / SUMMARY), MODELS, SUMMARY)
        states = {name: folder for name in models if not is_teacher(name) and name != CONTROL} or {"student": folder}
        if CONTROL in models:
            states[CONTROL] = folder / CONTROL
        recipe = folder / RECIPE
        return cls(
            folder=folder,
            facts=with_methods(checked(read_json(folder / FACTS), FACT_KINDS, FACTS)),
            models=models,
            recipe=read_recipe(recipe),
            results=read_json(folder / RESULTS),
            histories={name: read_json(path / STATE).get("log_history", []) for name, path in states.items()},
            precision=read_json(folder / PRECISION),
        )

    @property
    def student(self) -> str:
        """The row of the student that this folder holds."""
        return next((name for name in self.models if not is_teacher(name) and name != CONTROL), "student")


def is_teacher(name: str) -> bool:
    """True for the row of a teacher: `teacher`, or `teacher 1` of several."""
    return name.split()[0] == "teacher"


def check_output_folder(folder: str | Path, models: Mapping[str, str | None]) -> None:
    """Rejects an output folder that is the source folder of a model, which the run would overwrite.

    Args:
        folder (`str` or `Path`): the run's output folder.
        models (`dict[str, str | None]`): Hub ids and folders that the run loads, by role.

    Raises:
        ValueError: one of them is the output folder.
    """
    for role, name in models.items():
        source = Path(name or "").expanduser()
        if name and there(name) and source.resolve() == Path(folder).expanduser().resolve():
            raise ValueError(
                f"output_dir must not be the folder of the {role}, {name}: the run would overwrite it. Choose another "
                "output_dir."
            )


def with_methods(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts with a list of methods, also those of runs that recorded only their `--method`."""
    named = [name.strip() for name in str(facts.get("method") or "none").split(",")]
    return {"methods": [] if named == ["none"] else named} | facts


IDENTITY = (
    "dataset_name",
    "dataset_train_split",
    "unlabeled_dataset_name",
    "labeled_fraction",
    "model_name_or_path",
    "config_name",
    "teacher_model_name_or_path",
    "method",
    "image_size",
    "seed",
)
"""Arguments that make a run another one."""


def check_same_run(folder: str | Path, recipe: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Rejects an output folder that holds another run, which this one would overwrite or go on from.

    Args:
        folder (`str` or `Path`): the run's output folder.
        recipe (`dict`): the arguments of this run, but for those that have their defaults.
        defaults (`dict`): values of arguments that a recipe leaves out.

    Raises:
        ValueError: with the first argument in which they differ.
    """
    file = Path(folder) / RECIPE
    if not file.is_file():
        return
    stored = read_recipe(file)
    for name in IDENTITY:
        old, new = (values.get(name, defaults.get(name)) for values in (stored, recipe))
        if _in_full(old) != _in_full(new):
            raise ValueError(
                f"{folder} holds another run: its {name} is {old or 'the default'}, and here {new or 'the default'}. "
                "Choose another --output_dir, or delete that one."
            )


def check_free(
    folder: str | Path, recipe: Mapping[str, Any], resumes: bool, defaults: Mapping[str, Any] | None = None
) -> None:
    """Rejects an output folder that holds another run, or this one unless it goes on from there.

    Args:
        folder (`str` or `Path`), recipe (`dict`), defaults (`dict`): see [`check_same_run`].
        resumes (`bool`): the run in the folder goes on.

    Raises:
        ValueError: it holds another run, or the results or checkpoints of this one.
    """
    check_same_run(folder, recipe, defaults or {})
    if resumes:
        return
    checkpoints, ended = checkpoints_of(Path(folder)), Path(folder, RESULTS).is_file()
    if ended or checkpoints:
        found = "a finished run" if ended else f"an unfinished run ({checkpoints[0].name})"
        raise ValueError(
            f"{folder} holds {found}: --resume_from_checkpoint true goes on from it, and --overwrite_output_dir "
            "deletes it and begins anew."
        )


def delete_run(folder: str | Path) -> None:
    """Deletes the run in an output folder: its checkpoints, and the files by which a run is known."""
    place = Path(folder)
    for part in (place, place / CONTROL):
        for path in checkpoints_of(part):
            shutil.rmtree(path)
        for name in (RESULTS, STATE, SUMMARY, FACTS, PRECISION, RECIPE):
            (part / name).unlink(missing_ok=True)


def _in_full(value: Any) -> Any:
    """Paths of one file in one form."""
    place = Path(str(value)).expanduser()
    return place.resolve() if value is not None and there(place) else str(value)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file does not exist.

    Raises:
        ValueError: it holds something else, such as half of what was written.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # halves of characters can be read, and not written
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}): it was not written to its end. Delete it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, but holds a {type(content).__name__}. Delete it.")
    return content


def read_recipe(file: Path) -> dict[str, Any]:
    """The arguments in a recipe file; empty if the file does not exist.

    Raises:
        ValueError: it holds something else.
    """
    content = (read_yaml(file) or {}) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold `argument: value` lines, but holds a {type(content).__name__}.")
    return {str(name): value for name, value in content.items()}


def write_recipe(folder: Path, arguments: dict[str, Any]) -> None:
    """Writes the recipe of an output folder, without tokens, and with `~` for the home folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECIPE, yaml.safe_dump(under_home(arguments), sort_keys=False))


def change_recipe(folder: Path, arguments: dict[str, Any]) -> None:
    """Sets arguments in the recipe of an output folder, which is created if it does not exist."""
    file = folder / RECIPE
    write_recipe(folder, read_recipe(file) | arguments)
