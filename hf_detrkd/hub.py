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
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

from .run_files import FACTS, PRECISION, RECIPE, RESULTS, SUMMARY, portable, read_json


logger = logging.get_logger(__name__)

STUDENT_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
)
RUN_FILES = ("README.md", RECIPE, RESULTS, SUMMARY, FACTS, PRECISION, "teacher_results.json", "*.png", "report.html")
STAGE = ".push-"  # folders of links, inside the output folder, so that they are on one disk
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


class HubPush:
    """Uploads an output folder, in the background while the training goes on.

    Args:
        folder (`Path`): the run's output folder.
        repo_id (`str`): repository, with or without a namespace.
        token (`str`, *optional*): default: the one that `hf auth login` or the environment gave.
        private (`bool`): of a repository that is made here.
        revision (`str`, *optional*): branch to push to, made where it is missing.
        patience (`float`): seconds that [`finish`] waits for an upload before it is given up.
    """

    def __init__(
        self,
        folder: Path,
        repo_id: str,
        token: str | None = None,
        private: bool = True,
        revision: str | None = None,
        patience: float = 600.0,
    ):
        self.folder, self.repo_id, self.revision = folder, repo_id, revision
        self.private, self.patience = private, patience
        self._environment = os.environ | ({} if token is None else {"HF_TOKEN": token})
        self._running: list[tuple[subprocess.Popen[str], Path]] = []
        self._answers: list[dict[str, Any]] = []
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
        )

    @property
    def command(self) -> str:
        """What pushes the output folder later."""
        branch = "" if self.revision is None else f" --hub_revision {self.revision}"
        public = "" if self.private else " --hub_private_repo false"
        return f"python scripts/push.py {self.folder} --hub_model_id {self.repo_id}{branch}{public}"

    def check(self) -> None:
        """Makes the repository, and asks for the right to write to it.

        Raises:
            ValueError: the Hub says that this token may not write there. A Hub that does not answer is a warning.
        """
        for left in self.folder.glob(f"{STAGE}*"):  # by a run that was killed
            shutil.rmtree(left)
        process = self._start("check")
        answer = self._answer(process, min(CHECK_SECONDS, self.patience))
        if answer.get("status") in (401, 403):
            raise ValueError(
                f"push_to_hub needs the right to write to {self.repo_id}, but the Hub refuses it ({answer['error']}): "
                "log in with `hf auth login` and a token that may write, change hub_model_id, or leave --push_to_hub "
                f"out and push after the run with `{self.command}`."
            )
        if "error" in answer:
            self._warned = True
            logger.warning(
                f"The Hub cannot be reached before the run ({answer['error']}). The run goes on, everything stays in "
                f"{self.folder}, and each save tries again; later, push it with: {self.command}"
            )
        self.repo_id = answer.get("repo_id", self.repo_id)

    def push(self, source: Path, names: Iterable[str], message: str, path_in_repo: str | None = None) -> None:
        """Starts to upload files of a folder as one commit.

        Args:
            source (`Path`): their folder; it may change or go as soon as this returns.
            names (`Iterable[str]`): patterns of the files' names.
            message (`str`): of the commit.
            path_in_repo (`str`, *optional*): folder in the repository.
        """
        stage = staged(source, names, self.folder)
        options = ["--folder", str(stage), "--message", message]
        options += [] if self.revision is None else ["--revision", self.revision]
        options += [] if path_in_repo is None else ["--path_in_repo", path_in_repo]
        self._running.append((self._start("push", *options), stage))

    def is_done(self) -> bool:
        """Whether no upload is under way."""
        self._collect(wait=False)
        return not self._running

    def wait_until_done(self) -> None:
        """Waits for the uploads under way, as long as the patience allows."""
        self._collect(wait=True)

    def finish(self) -> PushedCommit | None:
        """Waits for the last upload and says what has become of it.

        Returns:
            [`PushedCommit`], or `None` where the Hub did not take it.
        """
        self.wait_until_done()
        answer = self._answers[-1] if self._answers else {"error": "nothing was pushed"}
        if "error" in answer:
            logger.warning(
                f"The student was not pushed to {self.repo_id} ({answer['error']}). Nothing is lost, all of it is in "
                f"{self.folder}; push it with: {self.command}"
            )
            return None
        self.repo_id = answer["repo_id"]
        return PushedCommit(answer["repo_id"], answer["commit_url"], answer["oid"])

    def _start(self, action: str, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).with_name("upload.py")), action, "--repo_id", self.repo_id]
        command += ["--private"] if self.private else []
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} if action == "check" or "progress" in " ".join(options) else {}
        return subprocess.Popen(
            [*command, *options], env=self._environment | quiet, stdout=subprocess.PIPE, text=True, close_fds=True
        )

    def _answer(self, process: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
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

    def _collect(self, wait: bool) -> None:
        """Takes the answers of uploads that have ended, and removes their links."""
        deadline = time.monotonic() + self.patience
        for process, stage in list(self._running):
            if not wait and process.poll() is None:
                return  # the later ones wait for it anyway
            answer = self._answer(process, max(0.0, deadline - time.monotonic()))
            self._running.remove((process, stage))
            self._answers.append(answer)
            shutil.rmtree(stage, ignore_errors=True)
            if "error" in answer and not wait and not self._warned:
                self._warned = True
                logger.warning(
                    f"The Hub did not take a checkpoint ({answer['error']}). The training goes on, nothing is lost, "
                    "and the next save tries again."
                )


def staged(source: Path, names: Iterable[str], folder: Path) -> Path:
    """A folder of links to files, safe from what happens to the files' names; the recipe without the machine's paths.

    Args:
        source (`Path`): the files' folder.
        names (`Iterable[str]`): patterns; `**/*` takes everything.
        folder (`Path`): where the new folder is made.
    """
    stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=folder))
    for file in sorted({file for name in names for file in source.glob(name) if file.is_file()}):
        goal = stage / file.relative_to(source)
        goal.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, goal)
        except OSError:  # a file system without links
            shutil.copy2(file, goal)
    if (stage / RECIPE).is_file():
        recipe = yaml.safe_load((stage / RECIPE).read_text()) or {}
        (stage / RECIPE).unlink()  # the link, not the file
        (stage / RECIPE).write_text(yaml.safe_dump(portable(recipe), sort_keys=False))
    return stage


def push_run(folder: Path, **options: Any) -> PushedCommit | None:
    """Pushes the output folder of a finished run; see [`HubPush`] for the options.

    Raises:
        ValueError: the folder holds no student, or the token may not write.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} must be the output folder of a run, but holds no config.json of a student.")
    known = read_json(folder / FACTS).get("hub") or {}
    push = HubPush(folder, **{"repo_id": folder.resolve().name} | known | options)
    push.check()
    push.push(folder, (*STUDENT_FILES, *RUN_FILES), "Student, results and card")
    return push.finish()
