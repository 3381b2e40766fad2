"""Pushes the output folder of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ...answers import StoredAnswers
from ...answers.reader import ANSWER_FILES
from ..answers_card import answers_card
from ..model_card import write_card
from ..run_folder import FACTS, SUMMARY, Run, read_json
from ..whole_checkpoints import newest_whole
from .background_push import HubPush, PushedCommit
from .files import Part, parts_of


def push_run(folder: Path, **options: Any) -> PushedCommit | None:
    """Pushes the output folder of a run, with a card for the repository; see [`HubPush`] for options.

    Raises:
        ValueError: the folder holds no student, or the token has no write access.
    """
    if not (folder / "config.json").is_file():
        last = newest_whole(folder)[0]
        hint = "Train a student first: hf-detrkd distill --output_dir FOLDER ..."
        if last is not None:
            hint = f"The run is not finished: push {last}, or resume the run."
        found = "holds no config.json of a student" if folder.is_dir() else "does not exist"
        raise ValueError(f"{folder} must be the output folder of a run, but {found}. {hint}")
    known = read_json(folder / FACTS).get("hub") or {}
    push = HubPush(folder, **{"repo_id": folder.resolve().name} | known | options)
    if not push.check():
        return None
    if (folder / SUMMARY).is_file():
        write_card(Run.read(folder), push.repo_id)
    for part in parts_of(folder, push.strategy):
        push.push(part, "Student, results and card")
    return push.finish()


def push_answers(folder: Path, **options: Any) -> PushedCommit | None:
    """Pushes stored answers as a data set repository, with a card; see [`HubPush`] for options.

    Raises:
        ValueError: the folder holds no complete answers, or the token has no write access.
    """
    answers = StoredAnswers(folder)  # which are complete
    push = HubPush(folder, **{"repo_id": folder.resolve().name} | options, repo_type="dataset")
    if not push.check():
        return None
    (folder / "README.md").write_text(answers_card(answers.manifest, push.repo_id))
    push.push(Part(folder, ANSWER_FILES), "Answers and card")
    return push.finish()


def license_of(repo_id: str | None) -> str | None:
    """The license in a model's card on the Hub, or `None` if unavailable."""
    if repo_id is None:
        return None
    try:
        card = HfApi().model_info(repo_id, timeout=10).card_data
        return None if card is None else card.get("license")
    except Exception:  # no network, no such model: then the card states none
        return None
