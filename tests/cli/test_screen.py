"""What the screen says of a mistake: one sentence and a status, and the traceback only with `--debug`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_detrkd.cli.main import main as hf_detrkd
from hf_detrkd.cli.screen import Parser, run, without_debug
from hf_detrkd.data import DatasetError


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
