"""Two processes that train together, started by torchrun once and given one function after the other.

    python -m torch.distributed.run --nproc-per-node=2 --standalone -m tests.together FOLDER PID

They take what they are to do from files of the folder, and end with the process that asks.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from filelock import FileLock

from tests import ROOT


PROCESSES = 2
SECONDS = 240
PAUSE = 0.02


def run_together(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """Runs a function of a module in two processes at once, and returns what each printed; what one raises fails the
    test. All tests that run side by side have one pair, and wait for each other."""
    folder, asking = _place()
    with FileLock(folder.with_suffix(".lock")):
        folder.mkdir(exist_ok=True)
        current = folder / "current"
        if not current.exists():
            current.write_text(tempfile.mkdtemp(dir=folder))
            _start(Path(current.read_text()), asking)
        try:
            return _ask(Path(current.read_text()), function, arguments)
        except BaseException:
            current.unlink()  # the next function gets new processes
            raise


def _place() -> tuple[Path, int]:
    """The folder of these tests, and the process that they end with: of pytest-xdist, or this one."""
    name = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    asking = os.getppid() if name else os.getpid()
    return Path(tempfile.gettempdir(), f"together-{name or asking}"), asking


def _start(folder: Path, asking: int) -> None:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES}", "--master-port=0", "--standalone"]
    command = [sys.executable, *launcher, "-m", "tests.together", str(folder), str(asking)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(folder / "log.txt", "w") as log:
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def _ask(folder: Path, function: Callable[..., Any], arguments: Sequence[Any]) -> list[str]:
    count = len(list(folder.glob("*.task")))
    files = [folder / f"{count}.{rank}.answer" for rank in range(PROCESSES)]
    _write(folder / f"{count}.task", (function, arguments))
    answers, end = [], time.monotonic() + SECONDS
    while len(answers) < PROCESSES and not any(error for _, error in answers):
        assert time.monotonic() < end, (folder / "log.txt").read_text()[-3000:]
        time.sleep(PAUSE)
        answers = [pickle.loads(file.read_bytes()) for file in files if file.exists()]
    failed = [printed[-3000:] + error for printed, error in answers if error]
    if failed:
        (folder / "end").touch()
        raise AssertionError("\n".join(failed))
    return [printed for printed, _ in answers]


def _write(file: Path, content: Any) -> None:
    file.with_suffix(".part").write_bytes(pickle.dumps(content))
    file.with_suffix(".part").replace(file)


def _work(function: Callable[..., Any], arguments: Sequence[Any], log: Path) -> tuple[str, str]:
    """What a function printed, and the traceback of what it raised."""
    error = ""
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        function(*arguments)
        assert PartialState().num_processes == PROCESSES, "the two processes ran each for itself"
    except BaseException:
        error = traceback.format_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return log.read_text(), error


def main(folder: Path, asking: int) -> None:
    """One of the processes: one function after the other, until the process that asks has ended."""
    rank = os.environ["RANK"]
    torch.set_num_threads(1)
    PartialState.destroy_process_group = lambda self, group=None: torch.distributed.barrier()  # for the next function
    count = 0
    while psutil.pid_exists(asking) and not (folder / "end").exists():
        task = folder / f"{count}.task"
        if task.exists():
            function, arguments = pickle.loads(task.read_bytes())
            _write(folder / f"{count}.{rank}.answer", _work(function, arguments, folder / f"{rank}.txt"))
            count += 1
        time.sleep(PAUSE)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # torch's process groups abort now and then when the interpreter ends
