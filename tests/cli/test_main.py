"""`hf-detrkd`: what goes to accelerate, what to the script, and what comes back."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

import hf_detrkd
from hf_detrkd import METHODS
from hf_detrkd.cli import arguments as distill_arguments
from hf_detrkd.cli import evaluate
from hf_detrkd.cli import main as cli
from hf_detrkd.cli.shipped import shipped
from tests import ROOT, script


TOOLS = ("support_table", "export_table", "house", "release")
"""Scripts for developers, which use what is in no package: the tests' detectors, the linter's graph, git."""
DOORS = [file for file in sorted((ROOT / "scripts").glob("*.py")) if file.stem not in TOOLS]
SHOWS = """import sys

def main(argv):
    print("got", argv, flush=True)
    return 3 if "fail" in argv else None

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the place of every command, that shows its arguments and fails when it is told to."""
    (tmp_path / "shows_arguments.py").write_text(SHOWS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(cli, "COMMANDS", dict.fromkeys(cli.COMMANDS, ("shows_arguments", "")))
    return "shows_arguments"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be launched by accelerate."""
    seen: list[Any] = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", seen.append)
    return seen


def test_accelerate_gets_its_arguments_wherever_they_stand_and_the_script_the_rest_in_order(
    shows: str, launched: list[Any]
) -> None:
    line = "--num_processes 1 --config r.yaml --cpu --learning_rate 1e-4 --main-process-port=0 --freeze a b --bf16"
    assert cli.main(["distill", *line.split(), "--accelerate_config", "multi.yaml"]) == 0
    (parsed,) = launched
    assert (parsed.num_processes, parsed.cpu, parsed.main_process_port) == (1, True, 0)
    assert (parsed.config_file, parsed.multi_gpu, parsed.mixed_precision) == ("multi.yaml", False, None)
    assert (parsed.training_script, parsed.module) == (shows, True)
    assert " ".join(parsed.training_script_args) == "--config r.yaml --learning_rate 1e-4 --freeze a b --bf16"
    untouched = launch_command_parser().parse_args([shows])
    assert vars(parsed).keys() == vars(untouched).keys()


def test_several_processes_on_the_cpu_are_started(shows: str, launched: list[Any]) -> None:
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


def test_a_configuration_of_accelerate_is_given_by_its_name_or_as_a_file() -> None:
    given, _ = cli.split_arguments(["--accelerate_config", "cpu"])
    assert given.config_file == str(ROOT / "scripts" / "accelerate_configs" / "cpu.yaml")
    given, _ = cli.split_arguments(["--accelerate_config=my/own.yaml"])
    assert given.config_file == "my/own.yaml"


def test_the_configuration_for_the_cpu_starts_two_processes(shows: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["distill", "--accelerate_config", "cpu", "--main_process_port", "0", "--seed", "1"]) == 0
    assert capfd.readouterr().out.count("got ['--seed', '1']\n") == 2


@pytest.mark.parametrize("command", ["export", "demo"])
def test_a_missing_extra_is_one_sentence(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, cli.COMMANDS[command][0], None)  # as if its import failed
    assert cli.main([command, "--output_dir", "x"]) == 1
    assert capsys.readouterr().err.count("\n") == 2


def options_in(text: str) -> set[str]:
    return {option.replace("-", "_") for option in re.findall(r"--([a-z][\w-]+)", text)}


@pytest.mark.parametrize("method", ["none", *METHODS])
def test_an_argument_that_accelerate_knows_too_is_the_scripts(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        distill_arguments.parse(["--method", method, "--help_all"])
    own = options_in(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    own |= options_in(capsys.readouterr().out)
    of_accelerate = {o[2:].replace("-", "_") for a in launch_command_parser()._actions for o in a.option_strings}
    both = own & of_accelerate
    assert both >= {"gradient_accumulation_steps", "debug", "help"}  # or there is nothing to see here
    for name in both:
        taken, left = cli.split_arguments([f"--{name}", "4"])
        assert left == [f"--{name}", "4"] and vars(taken) == {}, name


def test_status_and_arguments_go_through_without_accelerate(shows: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "--num_processes", "2", "fail"]) == 3
    assert capfd.readouterr().out == "got ['--num_processes', '2', 'fail']\n"


def test_status_and_arguments_go_through_accelerate(shows: str, capfd: pytest.CaptureFixture[str]) -> None:
    launch = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    assert cli.main(["evaluate", *launch, "--dynamo_backend", "no", "--a", "1"]) == 0
    assert capfd.readouterr().out == "got ['--a', '1']\n"
    assert cli.main(["evaluate", *launch, "--dynamo_backend", "no", "fail"]) == 3


def test_the_doctor_takes_the_command_line_of_distill_and_runs_in_one_process(
    shows: str, launched: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", "--num_processes", "8", "--method", "kd_detr", "--multi_gpu"]) == 0
    shown = capfd.readouterr()
    assert shown.out == "got ['--method', 'kd_detr']\n" and "in one process" in shown.err and not launched


def test_help_of_a_launched_command_needs_no_accelerate(
    shows: str, launched: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["distill", "--method", "kd_detr", "--help"]) == 0
    assert capfd.readouterr().out == "got ['--method', 'kd_detr', '--help']\n" and not launched


def test_help_lists_every_command_with_what_its_module_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if re.match(r"  [a-z]+ {2}", line)}
    assert listed == {name: summary for name, (_, summary) in cli.COMMANDS.items()}
    for module, _ in cli.COMMANDS.values():
        assert callable(importlib.import_module(module).main)
    assert any("--num_processes" in line for line in lines)


@pytest.mark.parametrize("door", DOORS, ids=lambda path: path.stem)
def test_a_script_is_a_door_to_its_command(door: Path) -> None:
    docstring, *imports, run = ast.parse(door.read_text()).body
    assert isinstance(docstring, ast.Expr) and f"scripts/{door.name}" in ast.get_docstring(ast.parse(door.read_text()))
    assert ast.unparse(imports[0]) == "import sys" and len(imports) == 3
    assert ast.unparse(run.body[0]) == "sys.exit(run(main))"
    assert script(door.stem).main


@pytest.mark.parametrize("door", DOORS, ids=lambda path: path.stem)
def test_uv_runs_a_script_with_the_package_of_its_checkout(door: Path, settings: dict[str, dict[str, str]]) -> None:
    """Its inline metadata agree with setup.cfg."""
    (block,) = re.findall(r"^# /// script$\n((?:#(?: .*)?\n)+)# ///$", door.read_text(), flags=re.MULTILINE)
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    inline = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.MULTILINE))
    assert inline["requires-python"] == settings["options"]["python_requires"]
    (dependency,) = inline["dependencies"]
    name, _, extra = dependency.rstrip("]").partition("[")
    assert name == settings["metadata"]["name"] and (not extra or extra in settings["options.extras_require"])
    source = inline["tool"]["uv"]["sources"][name]
    assert (door.parent / source["path"]).resolve() == ROOT and source["editable"]


def test_a_command_that_is_none_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["distil", "--method", "none"]) == 2
    assert capsys.readouterr().err == "hf-detrkd has no command 'distil': did you mean distill?\n"
    assert cli.main(["xyz"]) == 2
    assert "choose one of distill, answer, evaluate" in capsys.readouterr().err
    assert cli.main([]) == 2


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-detrkd {hf_detrkd.__version__}\n"


def test_recipes_are_found_inside_an_installed_package_and_beside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("pkg/scripts", "scripts"):
        (tmp_path / folder / "recipes").mkdir(parents=True)
    (tmp_path / "scripts" / "recipes" / "one.yaml").write_text("")
    monkeypatch.setattr("hf_detrkd.cli.shipped.PACKAGE", tmp_path / "pkg")
    assert shipped("scripts/recipes/one.yaml") == tmp_path / "scripts" / "recipes" / "one.yaml"
    (tmp_path / "pkg" / "scripts" / "recipes" / "one.yaml").write_text("")
    assert shipped("scripts/recipes/one.yaml") == tmp_path / "pkg" / "scripts" / "recipes" / "one.yaml"
    assert shipped("scripts/recipes/two.yaml") is None


def test_each_recipe_is_listed_with_its_first_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed["papers/clockdistill_dab_coco"] == "CLoCKDistill on COCO, DAB-DETR"
    assert listed["quickstart"].endswith("beside the same student alone")
    assert all("python " not in text and "hf-detrkd " not in text for text in listed.values())


def test_a_wheel_holds_every_package_and_the_recipes_and_its_command_runs(tmp_path: Path) -> None:
    listing = ["git", "ls-files", "-co", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = files or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    files = [name for name in files if (ROOT / name).is_file() and "__pycache__" not in name]
    wanted = {name for name in files if name.startswith("hf_detrkd/")}
    data = {name for name in files if name.startswith(("scripts/recipes/", "scripts/accelerate_configs/"))}
    for name in [*wanted, *data, "setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = subprocess.run(build, cwd=tmp_path / "copy", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
        entry_points = wheel.read(next(name for name in held if name.endswith("entry_points.txt"))).decode()
        wheel.extractall(tmp_path / "installed")
    assert (wanted | {f"hf_detrkd/{name}" for name in data}) - held == set()
    assert not [name for name in held if name.startswith(("scripts/", "tests/"))]
    assert not [name for name in held if name.startswith("hf_detrkd/scripts/") and name.endswith(".py")]
    assert "hf-detrkd = hf_detrkd.cli.main:main" in entry_points
    code = """from hf_detrkd.cli import distill, main
assert main.main(["--version"]) == 0
distill.main(["--config", "scripts/recipes/quickstart.yaml", "--dry_run", "--use_cpu"])
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.startswith(f"hf-detrkd {hf_detrkd.__version__}")
    assert str(tmp_path / "installed" / "hf_detrkd" / "scripts" / "recipes" / "quickstart") in ran.stdout
