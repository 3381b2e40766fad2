"""What the screen says of a mistake: one sentence and a status, and the traceback only with `--debug`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_detrkd.cli import push
from hf_detrkd.cli.main import main as hf_detrkd
from hf_detrkd.cli.parser import Parser
from hf_detrkd.cli.screen import run, without_debug
from hf_detrkd.data import DatasetError
from hf_detrkd.models.loading import load_detector


@dataclass
class Options:
    learning_rate: float = 1.0
    image_size: str | None = None
    num_train_epochs: float = 3.0


def refuse(argv: list[str]) -> None:
    raise DatasetError(f"no data for {argv}")


def test_a_mistake_is_one_sentence(capsys):
    assert run(refuse, ["--a", "1"]) == 1
    assert capsys.readouterr().err == "error: no data for ['--a', '1']\n(--debug shows the traceback)\n"


def test_debug_keeps_the_error_and_is_taken_from_the_words():
    with pytest.raises(DatasetError, match=r"no data for \['--a', '1'\]"):
        run(refuse, ["--debug", "--a", "1"])
    assert without_debug(["--debug", "underflow_overflow"]) == (["--debug", "underflow_overflow"], False)


def test_an_error_of_a_library_says_where(capsys):
    assert run(lambda argv: len(Path("/no/such/file").read_text()), []) == 1
    assert "error: FileNotFoundError: [Errno 2] No such file" in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda argv: 1 // 0, [])


def test_the_process_is_named_where_there_are_several(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    run(refuse, [])
    assert capsys.readouterr().err.startswith("[process 1] error: no data")


def test_ctrl_c_has_its_status(capsys):
    def stop(argv: list[str]) -> None:
        raise KeyboardInterrupt

    assert run(stop, []) == 130 and "Interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learning_rat", "1"], "There is no --learning_rat: did you mean --learning_rate?"),
        (
            ["--imgsz", "640", "--epochs", "3"],
            "--imgsz: did you mean --image_size? There is no --epochs: did you mean",
        ),
        (["--xyz"], "There is no --xyz."),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
    ],
)
def test_a_mistyped_argument_gets_the_nearest(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        Parser(Options, allow_abbrev=False).parse_args_into_dataclasses(args=words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and "usage" not in error


def test_the_command_says_mistakes_so(capsys):
    assert hf_detrkd(["predict", "--model_name_or_path", "x", "--input", "/no/image.jpg"]) == 1
    assert capsys.readouterr().err.startswith("error: --input must be an image or a folder of images")


def test_the_other_processes_say_that_they_ended_with_another(capsys, monkeypatch):
    def lost(argv: list[str]) -> None:
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")

    with pytest.raises(RuntimeError):
        run(lost, [])  # of a single process it is a fault
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run(lost, []) == 1
    assert capsys.readouterr().err == "[process 0] ended, because another process of this run did.\n"


@pytest.mark.distributed
def test_the_cause_comes_last_with_its_process(tmp_path: Path) -> None:
    """An image that only the second process reads is torn."""
    (tmp_path / "fails.py").write_text(
        "import os\n"
        "import torch.distributed as dist\n"
        "from accelerate import PartialState\n"
        "from hf_detrkd.cli.screen import run\n"
        "def main(argv):\n"
        "    state = PartialState(cpu=True)\n"
        "    assert state.num_processes == 2\n"
        "    if state.process_index == 1:\n"
        "        raise ValueError('the cause')\n"
        "    dist.barrier()\n"
        "os._exit(run(main, []))\n"
    )
    code = "import sys; from hf_detrkd.cli.main import launch, split_arguments; "
    code += "sys.exit(launch('fails', *split_arguments(['--num_processes', '2', '--cpu'])))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200, env=environment()
    )
    assert ran.returncode == 1
    assert ran.stderr.strip().splitlines()[-1].endswith("[process 1] failed first: ValueError: the cause"), ran.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


def test_pushing_before_there_is_a_student_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere must be .*, but does not exist\. Train a student first: hf-detrkd"):
        push.main([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match=r"but holds no config.json of a student\. Train a student first"):
        push.main([str(tmp_path)])


def test_a_path_that_does_not_exist_is_no_id_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^The model '.*gone' cannot be loaded: there is no such folder\.$"):
        load_detector(str(tmp_path / "gone"))
