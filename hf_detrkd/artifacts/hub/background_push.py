"""Uploads the student to the Hub in background processes.

Every upload is a separate process (`worker.py`) on a folder of links: a Hub that is down, slow or denies access does
not interrupt or slow down training, and a checkpoint may be deleted during its upload.
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
from typing import Any, ClassVar, Literal

from transformers.utils import logging

from ..redaction import for_shell, under_home
from .files import Part, remove_stages, staged


logger = logging.get_logger(__name__)

CHECK_SECONDS = 60.0  # time limit of the check for write access before a run


@dataclass(frozen=True)
class PushedCommit:
    """The commit of a finished push.

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
    """One pending commit: the arguments of `worker.py`, its folder of links, its verbosity and its process."""

    options: list[str]
    stage: Path
    quiet: bool
    process: subprocess.Popen[str] | None = None


class HubPush:
    """Uploads an output folder in the background during training, one commit after the other.

    Args:
        folder (`Path`): the run's output folder.
        repo_id (`str`): repository, with or without a namespace.
        token (`str`, *optional*): default: that of `hf auth login` or the environment.
        private (`bool`): visibility of a repository that is created here.
        revision (`str`, *optional*): branch to push to, created if it is missing.
        timeout (`float`, *optional*): seconds that [`finish`] waits for pending uploads before giving up; default: no
            limit.
        strategy (`str`, *optional*): the run's `hub_strategy`.
        repo_type (`str`): `model` for a student, `dataset` for stored answers.

    Attributes:
        waits (`tuple[float]`): seconds between attempts, on top of those of the Hub's client for single requests.
    """

    waits: ClassVar[tuple[float, ...]] = (2.0, 8.0)

    def __init__(
        self,
        folder: Path,
        repo_id: str,
        token: str | None = None,
        private: bool = True,
        revision: str | None = None,
        timeout: float | None = None,
        strategy: str | None = None,
        repo_type: Literal["model", "dataset"] = "model",
    ):
        self.folder, self.repo_id, self.revision, self.strategy = folder, repo_id, revision, strategy
        self.repo_type = repo_type
        self.private, self.timeout = private, timeout
        self._environment = os.environ | ({} if token is None else {"HF_TOKEN": token})
        self._uploads: deque[Upload] = deque()  # the first is running
        self._answers: list[dict[str, Any]] = []  # results of the uploads that [`finish`] waits for
        self._warned = False

    @classmethod
    def of(cls, args: Any, token: str | None = None, private: bool | None = None) -> HubPush:
        """From a run's arguments; a repository that is created here is private unless `hub_private_repo` is false."""
        folder = Path(args.output_dir)
        chosen = args.hub_private_repo if private is None else private
        return cls(
            folder,
            args.hub_model_id or folder.absolute().name,
            token=token or args.hub_token,
            private=chosen is not False,
            revision=args.hub_revision,
            timeout=args.hub_timeout,
            strategy=args.hub_strategy.value,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """Settings that a later push needs."""
        return {
            "repo_id": self.repo_id,
            "private": self.private,
            "revision": self.revision,
            "strategy": self.strategy,
        }

    @property
    def command(self) -> str:
        """Command that pushes the output folder later."""
        branch = "" if self.revision is None else f" --hub_revision {for_shell(self.revision)}"
        public = "" if self.private else " --hub_private_repo false"
        return f"hf-detrkd push {for_shell(str(self.folder))} --hub_model_id {for_shell(self.repo_id)}{branch}{public}"

    def check(self, make: bool = True) -> bool:
        """Checks write access to the repository.

        Args:
            make (`bool`): create it if it does not exist.

        Returns:
            `bool`: false if the Hub does not respond, which also logs a warning.

        Raises:
            ValueError: the token has no write access, or the repository id is invalid.
        """
        remove_stages(self.folder)
        process = self._start("check" if make else "ask", ["--quiet"], quiet=True)
        answer = self._answer(process, min(CHECK_SECONDS, self.timeout or CHECK_SECONDS))
        later = f"remove --push_to_hub and push after the run with `{self.command}`"
        if answer.get("kind") == "refused":
            raise ValueError(
                f"push_to_hub needs write access to {self.repo_id}, but the Hub denies it ({answer['error']}): log "
                f"in with `hf auth login` and a token with write access, change hub_model_id, or {later}."
            )
        if answer.get("kind") == "invalid":
            raise ValueError(
                f"push_to_hub needs a valid repository, but the Hub rejects {self.repo_id} ({answer['error']}): "
                f"change hub_model_id, which defaults to the output folder's name, or {later}."
            )
        if "error" in answer:
            self._warned = True
            logger.warning(
                f"The Hub cannot be reached ({answer['error']}). A run continues without it: all files stay "
                f"in {under_home(str(self.folder))}, and each save tries again. To push later, run: {self.command}"
            )
        self.repo_id = answer.get("repo_id", self.repo_id)
        return "error" not in answer

    def push(self, part: Part, message: str, quiet: bool = False) -> None:
        """Queues the upload of a folder's files as one commit.

        Args:
            part ([`~hf_detrkd.artifacts.hub.files.Part`]): its folder may be changed or deleted after this returns.
            message (`str`): of the commit.
            quiet (`bool`): for pushes during training: no progress bar, and not reported by [`finish`].
        """
        stage = staged(part, self.folder)
        options = ["--folder", str(stage), "--message", message]
        options += [] if self.revision is None else ["--revision", self.revision]
        options += [] if part.path_in_repo is None else ["--path_in_repo", part.path_in_repo]
        self._uploads.append(Upload([*options, "--quiet"] if quiet else options, stage, quiet))
        self.is_done()

    def is_done(self) -> bool:
        """Collects the results of ended uploads and starts the next one; true if none is left."""
        while self._uploads:
            upload = self._uploads[0]
            upload.process = upload.process or self._start("push", upload.options, upload.quiet)
            if upload.process.poll() is None:
                return False
            self._take(None)
        return True

    def wait_until_done(self) -> None:
        """Waits for the uploads, at most `timeout` seconds."""
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        while not self.is_done():
            self._take(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def finish(self) -> PushedCommit | None:
        """Waits for the uploads and reports their result.

        Returns:
            [`PushedCommit`], or `None` if an upload failed: a warning then gives the command to push later.
        """
        self.wait_until_done()
        answers, self._answers = self._answers or [{"error": "nothing was pushed"}], []
        faults = [answer["error"] for answer in answers if "error" in answer]
        if faults:
            what = "student was" if self.repo_type == "model" else "answers were"
            logger.warning(
                f"The {what} not pushed to {self.repo_id} ({faults[0]}). Nothing is lost: all files are in "
                f"{under_home(str(self.folder))}. To push them, run: {self.command}"
            )
            return None
        last = answers[-1]
        self.repo_id = last["repo_id"]
        return PushedCommit(last["repo_id"], last["commit_url"], last["oid"])

    def _start(self, action: str, options: list[str], quiet: bool) -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), action, "--repo_id", self.repo_id]
        command += ["--repo_type", self.repo_type, *(["--private"] if self.private else [])]
        command += ["--waits", *map(str, self.waits)]
        silence = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} if quiet else {}
        return subprocess.Popen(
            [*command, *options], env=self._environment | silence, stdout=subprocess.PIPE, text=True, close_fds=True
        )

    def _answer(self, process: subprocess.Popen[str], seconds: float | None) -> dict[str, Any]:
        """The result of a process, which is killed after `seconds`."""
        try:
            printed, _ = process.communicate(timeout=seconds)
            return json.loads(printed.strip().splitlines()[-1])
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return {"error": f"no response within {seconds:.0f} s"}
        except (IndexError, ValueError):
            return {"error": f"the upload process exited with status {process.returncode}"}

    def _take(self, seconds: float | None) -> None:
        """Collects the result of the first upload, and removes its links."""
        upload = self._uploads.popleft()
        assert upload.process is not None
        answer = self._answer(upload.process, seconds)
        shutil.rmtree(upload.stage, ignore_errors=True)
        if not upload.quiet:
            self._answers.append(answer)
        elif "error" in answer and not self._warned:
            self._warned = True
            logger.warning(
                f"A checkpoint was not pushed to the Hub ({answer['error']}). Training continues, nothing is lost, "
                "and the next save tries again."
            )
