"""The half of the trainer that speaks with the Hub: pushes that never stop a training, and the student's card."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, get_last_checkpoint
from transformers.utils import logging

from .hub import HubPush, PushedCommit
from .hub_files import STUDENT_FILES, Part, parts_of
from .model_card import write_card
from .privacy import forget_machine, is_secret, under_home
from .recording import Record, write_run_files
from .run_files import FACTS, STATE, SUMMARY, Run, read_json


logger = logging.get_logger(__name__)


class SharingTrainer(Trainer):
    """`Trainer` with other pushes: what a Hub does or does not do costs the training nothing.

    `push_to_hub`, `hub_model_id`, `hub_strategy`, `hub_private_repo`, `hub_always_push` and `hub_revision` mean what
    they mean in [`~transformers.TrainingArguments`], except that a repository which is made here is private unless
    `hub_private_repo` is false. What goes to the Hub is named in [`~hf_detrkd.hub_files`]: student, image processor,
    card, recipe, results and pictures; never the teacher, a token or a path of the machine, and the optimizer's state
    only with the strategies `checkpoint` and `all_checkpoints`.
    """

    args: Any
    record: Record
    push_in_progress: HubPush | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository and asks for the right to write, on the first process.

        Raises:
            ValueError: the token may not write there. In a resumed run, which has something to lose, a warning.
        """
        if not self.is_world_process_zero():
            return
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        self.push_in_progress = HubPush.of(self.args, token, private)
        try:
            self.push_in_progress.check()
        except ValueError as error:
            if not self.args.resume_from_checkpoint:
                raise
            logger.warning(f"{error} The run is resumed nevertheless.")
        self.hub_model_id = self.push_in_progress.repo_id

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Starts the push of a checkpoint's student; with some strategies, of all the checkpoint."""
        push, strategy = self.push_in_progress, self.args.hub_strategy
        if push is None or strategy == HubStrategy.END:
            return
        if not push.is_done() and not self.args.hub_always_push:
            return
        self._tell_callbacks()
        folder, message = Path(checkpoint_folder), f"Training in progress, step {self.state.global_step}"
        forget_machine(folder / STATE)
        push.push(Part(folder, STUDENT_FILES), message, quiet=True)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
            push.push(Part(folder, ["**/*"], name), f"{message}, checkpoint", quiet=True)

    def _finish_current_push(self) -> None:
        """Nothing: the training does not wait for the Hub, [`push_to_hub`] does."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            forget_machine(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}" / STATE)

    def save_state(self) -> None:
        super().save_state()
        if self.args.should_save:
            forget_machine(Path(self.args.output_dir) / STATE)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; with `push_to_hub` the student is pushed, too, without waiting for the Hub."""
        super().save_model(output_dir, _internal_call=True)
        push = self.push_in_progress
        if push is not None and not _internal_call:
            push.push(Part(Path(output_dir or self.args.output_dir), STUDENT_FILES), "Model save", quiet=True)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> PushedCommit | HubPush | None:
        """Saves the student with its card, and uploads it with the run's results.

        Args:
            commit_message (`str`)
            blocking (`bool`): wait for the upload, `hub_timeout` seconds at most.
            token, revision, private (*optional*): in place of those of the arguments.
            card: as in [`create_model_card`].

        Returns:
            [`~hf_detrkd.hub.PushedCommit`], or `None` where the Hub did not take it: then a warning says how to push
            later. With `blocking=False` the [`HubPush`] that is under way, which has `finish()`.

        Raises:
            ValueError: the token may not write there.
        """
        self._tell_callbacks()
        if self.push_in_progress is None or token is not None or private is not None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        push = self.push_in_progress
        if push is None:  # not the first process
            return None
        push.revision = revision or push.revision
        self.create_model_card(**card)
        for part in parts_of(push.folder, push.strategy):
            push.push(part, commit_message or "End of training")
        return push.finish() if blocking else push

    def _tell_callbacks(self) -> None:
        """Callbacks hear of a push, and trackio's goes to the Hub itself; what fails there stops nothing."""
        try:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
        except Exception as error:  # every tracker and its network have errors of their own
            logger.warning(f"A callback failed at the push ({error!r}). The push goes on.")

    def create_model_card(
        self,
        license: str | None = None,
        language: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | None = None,
        dataset_tags: str | None = None,
    ) -> None:
        """Writes `README.md` into the output folder from the run's files, see [`~hf_detrkd.model_card`].

        Args:
            license (`str`, *optional*): the student's, for example `apache-2.0`. Default: `hub_license`, or that of
                the model which it started from, where the Hub tells.
            language, tags (*optional*): for the card's metadata.
            model_name (`str`, *optional*): the card's title. Default: the repository's name.
            finetuned_from (`str`, *optional*): Hub id that the student started from.
            dataset (`str`, *optional*): name of the data set.
            dataset_tags (`str`, *optional*): its Hub id.
        """
        if not self.is_world_process_zero():
            return
        facts = self.record.facts
        given = {"base_model": finetuned_from, "dataset_name": dataset, "hub_dataset": dataset_tags}
        facts |= {name: value for name, value in given.items() if value is not None}
        facts["card"] = {
            "license": license or self.args.hub_license or license_of(facts.get("base_model")),
            "language": language,
            "tags": [tags] if isinstance(tags, str) else tags or [],
            "title": model_name,
        }
        push = self.push_in_progress
        write_card(write_run_files(self), None if push is None else push.repo_id)


def push_run(folder: Path, **options: Any) -> PushedCommit | None:
    """Pushes the output folder of a run, with a card for the repository; see [`~hf_detrkd.hub.HubPush`] for options.

    Raises:
        ValueError: the folder holds no student, or the token may not write.
    """
    if not (folder / "config.json").is_file():
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        hint = "" if last is None else f" Its run did not end: push {last}, or resume it."
        raise ValueError(f"{folder} must be the output folder of a run, but holds no config.json of a student.{hint}")
    known = read_json(folder / FACTS).get("hub") or {}
    push = HubPush(folder, **{"repo_id": folder.resolve().name} | known | options)
    if not push.check():
        return None
    if (folder / SUMMARY).is_file():
        write_card(Run.read(folder), push.repo_id)
    for part in parts_of(folder, push.strategy):
        push.push(part, "Student, results and card")
    return push.finish()


def license_of(repo_id: str | None) -> str | None:
    """The licence of a model as its card on the Hub says it; `None` where none is to be had."""
    if repo_id is None:
        return None
    try:
        card = HfApi().model_info(repo_id, timeout=10).card_data
        return None if card is None else card.get("license")
    except Exception:  # no network, no such model: then the card states none
        return None


def shareable(args: Any) -> Any:
    """Training arguments as they are saved beside a student: without tokens, and the home folder as `~`."""
    copied = copy.copy(args)
    for field in dataclasses.fields(copied):
        value = getattr(copied, field.name)
        setattr(copied, field.name, None if is_secret(field.name) else under_home(value))
    return copied
