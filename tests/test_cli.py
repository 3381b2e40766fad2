"""`hf-detrkd`: what goes to accelerate, what to the script, and what comes back."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

import hf_detrkd
from hf_detrkd import METHODS, cli


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import distill  # noqa: E402


SHOWS = """import sys
print("got", sys.argv[1:], flush=True)
sys.exit(3 if "fail" in sys.argv else 0)
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script of every command, that shows its arguments and fails when it is told to."""
    file = tmp_path / "shows.py"
    file.write_text(SHOWS)
    monkeypatch.setattr(cli, "script_of", lambda command: file)
    return file


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be launched by accelerate."""
    seen: list[Any] = []
    monkeypatch.setattr(cli, "launch_command", seen.append)
    return seen


def test_accelerate_gets_its_arguments_wherever_they_stand_and_the_script_the_rest_in_order(
    script: Path, launched: list[Any]
) -> None:
    line = "--num_processes 1 --config r.yaml --cpu --learning_rate 1e-4 --main-process-port=0 --freeze a b --bf16"
    assert cli.main(["distill", *line.split(), "--accelerate_config", "multi.yaml"]) == 0
    (parsed,) = launched
    assert (parsed.num_processes, parsed.cpu, parsed.main_process_port) == (1, True, 0)
    assert (parsed.config_file, parsed.multi_gpu, parsed.mixed_precision) == ("multi.yaml", False, None)
    assert parsed.training_script == str(script)
    assert " ".join(parsed.training_script_args) == "--config r.yaml --learning_rate 1e-4 --freeze a b --bf16"
    untouched = launch_command_parser().parse_args([str(script)])
    assert vars(parsed).keys() == vars(untouched).keys()


def test_several_processes_on_the_cpu_are_started(script: Path, launched: list[Any]) -> None:
    """accelerate itself starts one with --cpu."""
    assert cli.main(["distill", "--cpu", "--num_processes", "2", "--seed", "1"]) == 0
    assert cli.main(["distill", "--cpu", "--seed", "1"]) == 0
    (several, one) = launched
    assert (several.multi_gpu, several.cpu, several.training_script_args) == (
        True,
        False,
        ["--seed", "1", "--use_cpu"],
    )
    assert (one.multi_gpu, one.cpu, one.training_script_args) == (False, True, ["--seed", "1"])


def test_a_configuration_of_accelerate_is_given_by_its_name_or_as_a_file(script: Path) -> None:
    (script.parent / "accelerate_configs").mkdir()
    (script.parent / "accelerate_configs" / "two_gpus.yaml").write_text("")
    given, _ = cli.split_arguments(["--accelerate_config", "two_gpus"])
    assert given.config_file == str(script.parent / "accelerate_configs" / "two_gpus.yaml")
    given, _ = cli.split_arguments(["--accelerate_config=my/own.yaml"])
    assert given.config_file == "my/own.yaml"


def options_in(text: str) -> set[str]:
    return {option.replace("-", "_") for option in re.findall(r"--([a-z][\w-]+)", text)}


@pytest.mark.parametrize("method", ["none", *METHODS])
def test_an_argument_that_accelerate_knows_too_is_the_scripts(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        distill.parse(["--method", method, "--help"])
    own = options_in(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))["main"](["--help"])
    own |= options_in(capsys.readouterr().out)
    of_accelerate = {o[2:].replace("-", "_") for a in launch_command_parser()._actions for o in a.option_strings}
    both = own & of_accelerate
    assert both >= {"gradient_accumulation_steps", "debug", "help"}  # or there is nothing to see here
    for name in both:
        taken, left = cli.split_arguments([f"--{name}", "4"])
        assert left == [f"--{name}", "4"] and vars(taken) == {}, name


def test_status_and_arguments_go_through_without_accelerate(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "--num_processes", "2", "fail"]) == 3
    assert capfd.readouterr().out == "got ['--num_processes', '2', 'fail']\n"


def test_status_and_arguments_go_through_accelerate(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launch = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    assert cli.main(["evaluate", *launch, "--dynamo_backend", "no", "--a", "1"]) == 0
    assert capfd.readouterr().out == "got ['--a', '1']\n"
    assert cli.main(["evaluate", *launch, "--dynamo_backend", "no", "fail"]) == 3


def test_the_doctor_takes_the_command_line_of_distill_and_runs_in_one_process(
    script: Path, launched: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", "--num_processes", "8", "--method", "kd_detr", "--multi_gpu"]) == 0
    shown = capfd.readouterr()
    assert shown.out == "got ['--method', 'kd_detr']\n" and "in one process" in shown.err and not launched


def test_help_of_a_launched_script_needs_no_accelerate(
    script: Path, launched: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["distill", "--method", "kd_detr", "--help"]) == 0
    assert capfd.readouterr().out == "got ['--method', 'kd_detr', '--help']\n" and not launched


def test_help_lists_every_command_with_the_first_line_of_its_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if re.match(r"  [a-z]+ {2}", line)}
    assert tuple(listed) == cli.COMMANDS
    assert listed["predict"].startswith("Finds objects in an image")
    assert any("--num_processes" in line for line in lines)


def test_a_command_that_is_none_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["distil", "--method", "none"]) == 2
    assert capsys.readouterr().err == "hf-detrkd has no command 'distil': did you mean distill?\n"
    assert cli.main(["xyz"]) == 2
    assert "choose one of distill, evaluate" in capsys.readouterr().err
    assert cli.main([]) == 2


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-detrkd {hf_detrkd.__version__}\n"


def test_scripts_are_found_inside_an_installed_package_and_beside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pkg" / "scripts").mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "push.py").write_text("")
    monkeypatch.setattr(hf_detrkd, "__file__", str(tmp_path / "pkg" / "__init__.py"))
    assert cli.script_of("push") == tmp_path / "scripts" / "push.py"
    (tmp_path / "pkg" / "scripts" / "push.py").write_text("")
    assert cli.script_of("push") == tmp_path / "pkg" / "scripts" / "push.py"
    with pytest.raises(FileNotFoundError, match=r"predict\.py must be in .* but is in neither"):
        cli.script_of("predict")


@pytest.mark.slow
def test_a_wheel_holds_the_scripts_the_recipes_and_every_package(tmp_path: Path) -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = subprocess.run(build, cwd=tmp_path / "copy", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
        entry_points = wheel.read(next(name for name in held if name.endswith("entry_points.txt"))).decode()
    wanted = {name for name in files if name.startswith("hf_detrkd/")}
    wanted |= {f"hf_detrkd/{name}" for name in files if name.startswith("scripts/")}
    assert wanted - held == set()
    assert not [name for name in held if name.startswith(("scripts/", "tests/"))]
    assert "hf-detrkd = hf_detrkd.cli:main" in entry_points
