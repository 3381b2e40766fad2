"""The half of the trainer that speaks with the Hub: pushes that never stop a training, and the student's card."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from .hub import RUN_FILES, STUDENT_FILES, HubPush, PushedCommit
from .model_card import write_card
from .recording import Record, write_run_files
from .run_files import under_home


class SharingTrainer(Trainer):
    """`Trainer` with other pushes: what a Hub does or does not do costs the training nothing.

    `push_to_hub`, `hub_model_id`, `hub_strategy`, `hub_private_repo`, `hub_always_push` and `hub_revision` mean what
    they mean in [`~transformers.TrainingArguments`], except that a repository which is made here is private unless
    `hub_private_repo` is false. What goes to the Hub is named in [`~hf_detrkd.hub`]: student, image processor, card,
    recipe, results and pictures; never the teacher, a token or a path of the machine, and the optimizer's state only
    with the strategies `checkpoint` and `all_checkpoints`.
    """

    args: Any
    record: Record
    push_in_progress: HubPush | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository and asks for the right to write, on the first process.

        Raises:
            ValueError: the token may not write there.
        """
        if not self.is_world_process_zero():
            return
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        self.push_in_progress = HubPush.of(self.args, token, private)
        self.push_in_progress.check()
        self.hub_model_id = self.push_in_progress.repo_id

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Starts the push of a checkpoint's student; with some strategies, of all the checkpoint."""
        push, strategy = self.push_in_progress, self.args.hub_strategy
        if push is None or strategy == HubStrategy.END:
            return
        if not push.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder, message = Path(checkpoint_folder), f"Training in progress, step {self.state.global_step}"
        push.push(folder, STUDENT_FILES, message)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
            push.push(folder, ["**/*"], f"{message}, checkpoint", path_in_repo=name)

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
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.push_in_progress is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        push = self.push_in_progress
        assert push is not None
        push.wait_until_done()
        push.revision = revision or push.revision
        push.push(Path(self.args.output_dir), (*STUDENT_FILES, *RUN_FILES), commit_message or "End of training")
        return push.finish() if blocking else push

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
            license (`str`, *optional*): the student's, for example `apache-2.0`. Default: `hub_license`.
            language, tags, model_name (*optional*): for the card's metadata.
            finetuned_from (`str`, *optional*): Hub id that the student started from.
            dataset (`str`, *optional*): name of the data set.
            dataset_tags (`str`, *optional*): its Hub id.
        """
        if not self.is_world_process_zero():
            return
        facts = {"base_model": finetuned_from, "dataset_name": dataset, "hub_dataset": dataset_tags}
        self.record.facts |= {name: value for name, value in facts.items() if value is not None}
        write_card(
            write_run_files(self),
            model_name or self.hub_model_id,
            license=license or self.args.hub_license,
            language=language,
            tags=[tags] if isinstance(tags, str) else tags or [],
        )


def shareable(args: Any) -> Any:
    """Training arguments as they are saved beside a student: without tokens, and the home folder as `~`."""
    copied = copy.copy(args)
    for field in dataclasses.fields(copied):
        value = getattr(copied, field.name)
        setattr(copied, field.name, None if field.name.endswith("_token") else under_home(value))
    return copied
