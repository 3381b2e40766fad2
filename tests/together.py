"""Two processes that train together, started by torchrun once and given one function after the other.

    python -m torch.distributed.run --nproc-per-node=2 --standalone -m tests.together FOLDER PID

They take what they are to do from files of the folder, and end with the process that asks.
"""

from __future__ import annotations

import atexit
import functools
import os
import pickle
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

from tests import ROOT


PROCESSES = 2
SECONDS = 240
PAUSE = 0.02


class Together:
    """Processes that wait for functions."""

    def __init__(self) -> None:
        self.folder, self.count = Path(tempfile.mkdtemp()), 0
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES}", "--master-port=0", "--standalone"]
        command = [sys.executable, *launcher, "-m", "tests.together", str(self.folder), str(os.getpid())]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(self.folder / "log.txt", "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        atexit.register(self.process.terminate)

    def run(self, function: Callable[..., Any], arguments: Sequence[Any]) -> list[str]:
        """What each process printed; what one raises fails the test, and the next one gets new processes."""
        files = [self.folder / f"{self.count}.{rank}.answer" for rank in range(PROCESSES)]
        _write(self.folder / f"{self.count}.task", (function, arguments))
        self.count += 1
        answers, end = [], time.monotonic() + SECONDS
        while len(answers) < PROCESSES and not any(error for _, error in answers):
            if self.process.poll() is not None or time.monotonic() > end:
                answers = [("", f"No answer:\n{(self.folder / 'log.txt').read_text()[-3000:]}")]
                break
            time.sleep(PAUSE)
            answers = [pickle.loads(file.read_bytes()) for file in files if file.exists()]
        if any(error for _, error in answers):
            _started.cache_clear()
            self.process.terminate()
            raise AssertionError("\n".join(printed[-3000:] + error for printed, error in answers))
        return [printed for printed, _ in answers]


@functools.cache
def _started() -> Together:
    return Together()


def run_together(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """Runs a function of a module in two processes at once, and returns what each printed."""
    return _started().run(function, arguments)


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
    while psutil.pid_exists(asking):
        task = folder / f"{count}.task"
        if task.exists():
            function, arguments = pickle.loads(task.read_bytes())
            _write(folder / f"{count}.{rank}.answer", _work(function, arguments, folder / f"{rank}.txt"))
            count += 1
        time.sleep(PAUSE)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # torch's process groups abort now and then when the interpreter ends
