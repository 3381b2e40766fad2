"""The way of a student to the Hub: beside the training and never in its way.

Every upload is a process of its own (`upload.py`) over a folder of links: a Hub that is down, slow or refuses costs
the training nothing, and a checkpoint may be deleted while it is on its way.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..redaction import for_shell, under_home
from .files import Part, remove_stages, staged


logger = logging.get_logger(__name__)

CHECK_SECONDS = 60.0  # that the check of write access may take before a run


@dataclass(frozen=True)
class PushedCommit:
    """Where a push has arrived.

    Attributes:
        repo_id (`str`): with its namespace.
        commit_url (`str`)
        oid (`str`): the commit's hash.
    """

    repo_id: str
    commit_url: str
    oid: str


@dataclass
class Upload:
    """One commit on its way: what `upload.py` is told, its folder of links, whether it speaks, and its process."""

    options: list[str]
    stage: Path
    quiet: bool
    process: subprocess.Popen[str] | None = None


class HubPush:
    """Uploads an output folder, one commit after the other, in the background while the training goes on.

    Args:
        folder (`Path`): the run's output folder.
        repo_id (`str`): repository, with or without a namespace.
        token (`str`, *optional*): default: the one that `hf auth login` or the environment gave.
        private (`bool`): of a repository that is made here.
        revision (`str`, *optional*): branch to push to, made where it is missing.
        patience (`float`, *optional*): seconds that [`finish`] waits for uploads before they are given up; default:
            as long as they take.
        strategy (`str`, *optional*): the run's `hub_strategy`.
    """

    def __init__(
        self,
        folder: Path,
        repo_id: str,
        token: str | None = None,
        private: bool = True,
        revision: str | None = None,
        patience: float | None = None,
        strategy: str | None = None,
    ):
        self.folder, self.repo_id, self.revision, self.strategy = folder, repo_id, revision, strategy
        self.private, self.patience = private, patience
        self._environment = os.environ | ({} if token is None else {"HF_TOKEN": token})
        self._uploads: deque[Upload] = deque()  # the first is under way
        self._answers: list[dict[str, Any]] = []  # of what [`finish`] waits for
        self._warned = False

    @classmethod
    def of(cls, args: Any, token: str | None = None, private: bool | None = None) -> HubPush:
        """That of a run's arguments; a repository that is made here is private unless they say that it is not."""
        folder = Path(args.output_dir)
        chosen = args.hub_private_repo if private is None else private
        return cls(
            folder,
            args.hub_model_id or folder.absolute().name,
            token=token or args.hub_token,
            private=chosen is not False,
            revision=args.hub_revision,
            patience=args.hub_timeout,
            strategy=args.hub_strategy.value,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What a later push has to know."""
        return {
            "repo_id": self.repo_id,
            "private": self.private,
            "revision": self.revision,
            "strategy": self.strategy,
        }

    @property
    def command(self) -> str:
        """What pushes the output folder later."""
        branch = "" if self.revision is None else f" --hub_revision {for_shell(self.revision)}"
        public = "" if self.private else " --hub_private_repo false"
        return f"hf-detrkd push {for_shell(str(self.folder))} --hub_model_id {for_shell(self.repo_id)}{branch}{public}"

    def check(self, make: bool = True) -> bool:
        """Asks for the right to write to the repository.

        Args:
            make (`bool`): make it where there is none.

        Returns:
            `bool`: false where the Hub does not answer, which is a warning.

        Raises:
            ValueError: the Hub says that this token may not write there, or nobody can.
        """
        remove_stages(self.folder)
        process = self._start("check" if make else "ask", ["--quiet"], quiet=True)
        answer = self._answer(process, min(CHECK_SECONDS, self.patience or CHECK_SECONDS))
        later = f"leave --push_to_hub out and push after the run with `{self.command}`"
        if answer.get("kind") == "refused":
            raise ValueError(
                f"push_to_hub needs the right to write to {self.repo_id}, but the Hub refuses it ({answer['error']}): "
                f"log in with `hf auth login` and a token that may write, change hub_model_id, or {later}."
            )
        if answer.get("kind") == "invalid":
            raise ValueError(
                f"push_to_hub needs a repository that the Hub takes, but it does not take {self.repo_id} "
                f"({answer['error']}): change hub_model_id, which is by default the output folder's name, or {later}."
            )
        if "error" in answer:
            self._warned = True
            logger.warning(
                f"The Hub cannot be reached ({answer['error']}). A run goes on without it, everything stays in "
                f"{under_home(str(self.folder))}, and each save tries again; later, push it with: {self.command}"
            )
        self.repo_id = answer.get("repo_id", self.repo_id)
        return "error" not in answer

    def push(self, part: Part, message: str, quiet: bool = False) -> None:
        """Uploads files of a folder as one commit, after those before it.

        Args:
            part ([`~hf_detrkd.artifacts.hub.files.Part`]): its folder may change or go as soon as this returns.
            message (`str`): of the commit.
            quiet (`bool`): beside a training: no progress bar, and [`finish`] does not speak of it.
        """
        stage = staged(part, self.folder)
        options = ["--folder", str(stage), "--message", message]
        options += [] if self.revision is None else ["--revision", self.revision]
        options += [] if part.path_in_repo is None else ["--path_in_repo", part.path_in_repo]
        self._uploads.append(Upload([*options, "--quiet"] if quiet else options, stage, quiet))
        self.is_done()

    def is_done(self) -> bool:
        """Whether no upload is under way; takes the answers of those that ended, and starts the next one."""
        while self._uploads:
            upload = self._uploads[0]
            upload.process = upload.process or self._start("push", upload.options, upload.quiet)
            if upload.process.poll() is None:
                return False
            self._take(None)
        return True

    def wait_until_done(self) -> None:
        """Waits for the uploads, as long as the patience allows."""
        deadline = None if self.patience is None else time.monotonic() + self.patience
        while not self.is_done():
            self._take(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def finish(self) -> PushedCommit | None:
        """Waits for the uploads and says what has become of them.

        Returns:
            [`PushedCommit`], or `None` where the Hub did not take all: then a warning says how to push later.
        """
        self.wait_until_done()
        answers, self._answers = self._answers or [{"error": "nothing was pushed"}], []
        faults = [answer["error"] for answer in answers if "error" in answer]
        if faults:
            logger.warning(
                f"The student was not pushed to {self.repo_id} ({faults[0]}). Nothing is lost, all of it is in "
                f"{under_home(str(self.folder))}; push it with: {self.command}"
            )
            return None
        last = answers[-1]
        self.repo_id = last["repo_id"]
        return PushedCommit(last["repo_id"], last["commit_url"], last["oid"])

    def _start(self, action: str, options: list[str], quiet: bool) -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), action, "--repo_id", self.repo_id]
        command += ["--private"] if self.private else []
        silence = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} if quiet else {}
        return subprocess.Popen(
            [*command, *options], env=self._environment | silence, stdout=subprocess.PIPE, text=True, close_fds=True
        )

    def _answer(self, process: subprocess.Popen[str], seconds: float | None) -> dict[str, Any]:
        """What the Hub said; a process that takes longer is killed."""
        try:
            printed, _ = process.communicate(timeout=seconds)
            return json.loads(printed.strip().splitlines()[-1])
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return {"error": f"no answer within {seconds:.0f} s"}
        except (IndexError, ValueError):
            return {"error": f"the upload ended with {process.returncode}"}

    def _take(self, seconds: float | None) -> None:
        """Takes the answer of the first upload, and removes its links."""
        upload = self._uploads.popleft()
        assert upload.process is not None
        answer = self._answer(upload.process, seconds)
        shutil.rmtree(upload.stage, ignore_errors=True)
        if not upload.quiet:
            self._answers.append(answer)
        elif "error" in answer and not self._warned:
            self._warned = True
            logger.warning(
                f"The Hub did not take a checkpoint ({answer['error']}). The training goes on, nothing is lost, and "
                "the next save tries again."
            )
