"""Hub integration of the trainer: non-blocking pushes and the model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..artifacts.hub.background_push import HubPush, PushedCommit
from ..artifacts.hub.files import CHECKPOINT_FILES, STUDENT_FILES, Part, parts_of
from ..artifacts.hub.push_run import license_of
from ..artifacts.model_card import write_card
from ..artifacts.record import Record
from ..artifacts.redaction import forget_machine
from ..artifacts.run_folder import RESULTS, STATE, read_json
from ..artifacts.whole_files import make_whole, write_json


logger = logging.get_logger(__name__)


if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object


class HubPushMixin(Trainer):
    """Non-blocking Hub pushes for a `Trainer`; must come before `Trainer` in the base classes. Hub failures never
    interrupt or slow down training.

    `push_to_hub`, `hub_model_id`, `hub_strategy`, `hub_private_repo`, `hub_always_push` and `hub_revision` are as in
    [`~transformers.TrainingArguments`], except that a repository created here is private unless `hub_private_repo` is
    false. `hf_detrkd.artifacts.hub.files` lists the uploaded files: student, image processor, card, recipe, results
    and pictures; never the teacher, a token or a local path, and the optimizer state only with the strategies
    `checkpoint` and `all_checkpoints`.
    """

    args: Any
    record: Record
    push_in_progress: HubPush | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository and checks write access, on the first process.

        Raises:
            ValueError: the token has no write access. A resumed run only logs a warning, to keep its progress.
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
            logger.warning(f"{error} The run is resumed anyway.")
        self.hub_model_id = self.push_in_progress.repo_id

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: the checkpoint has not got its name yet; [`push_checkpoint`] comes when it has."""

    def push_checkpoint(self, folder: Path) -> None:
        """Starts the upload of a checkpoint's student or, depending on the strategy, of the whole checkpoint."""
        push, strategy = self.push_in_progress, self.args.hub_strategy
        if push is None or strategy == HubStrategy.END:
            return
        if not push.is_done() and not self.args.hub_always_push:
            return
        self._tell_callbacks()
        message = f"Training in progress, step {self.state.global_step}"
        push.push(Part(folder, STUDENT_FILES), message, quiet=True)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
            push.push(Part(folder, CHECKPOINT_FILES, name), f"{message}, checkpoint", quiet=True)

    def _finish_current_push(self) -> None:
        """Does nothing: training does not wait for the Hub; [`push_to_hub`] does."""

    def save_state(self) -> None:
        """As in `Trainer`, without the machine's paths, and whole or not at all."""
        if self.is_world_process_zero():
            file = Path(self.args.output_dir) / STATE
            make_whole(file, lambda new: self.state.save_to_json(str(new)))
            forget_machine(file)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """As in `Trainer`, but whole or not at all."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        write_json(folder / f"{split}_results.json", metrics)
        if combined:
            write_json(folder / RESULTS, read_json(folder / RESULTS) | metrics)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; with `push_to_hub` the student is also pushed, without blocking."""
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
        """Saves the student with its card and uploads it with the run's results.

        Args:
            commit_message (`str`)
            blocking (`bool`): wait for the upload, at most `hub_timeout` seconds.
            token, revision, private (*optional*): override those of the arguments.
            card: arguments of [`create_model_card`].

        Returns:
            [`PushedCommit`], or `None` if the upload failed: a warning then gives the command to push later. With
            `blocking=False` a [`HubPush`] handle for the pending upload, which has `finish()`.

        Raises:
            ValueError: the token has no write access.
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
        """Notifies callbacks of a push (trackio's uploads to the Hub itself); their errors are only logged."""
        try:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
        except Exception as error:  # every tracker and its network have errors of their own
            logger.warning(f"A callback failed during the push ({error!r}). The push continues.")

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
        """Writes the model card `README.md` from the run's files, see [`~hf_detrkd.artifacts.model_card`].

        Args:
            license (`str`, *optional*): the student's license, for example `apache-2.0`. Default: `hub_license`, or
                the license of the model that it started from, if the Hub states one.
            language, tags (*optional*): metadata of the card.
            model_name (`str`, *optional*): title of the card. Default: the repository's name.
            finetuned_from (`str`, *optional*): Hub id of the model that the student started from.
            dataset (`str`, *optional*): name of the data set.
            dataset_tags (`str`, *optional*): its Hub id.
        """
        if not self.is_world_process_zero():
            return
        given = {"base_model": finetuned_from, "dataset_name": dataset, "hub_dataset": dataset_tags}
        self.record.add_facts({name: value for name, value in given.items() if value is not None})
        card = {
            "license": license or self.args.hub_license or license_of(self.record.facts.get("base_model")),
            "language": language,
            "tags": [tags] if isinstance(tags, str) else tags or [],
            "title": model_name,
        }
        self.fill_record()
        self.record.add_facts({"card": card})
        push = self.push_in_progress
        write_card(self.record.write(self.args.output_dir), None if push is None else push.repo_id)

    def fill_record(self) -> None:
        """Adds the trainer's own facts and metrics to the record; implemented by the trainer."""
        raise NotImplementedError
