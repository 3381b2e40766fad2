"""`hf-detrkd`: the scripts of this package as one command.

    hf-detrkd distill --config recipe.yaml --num_processes 4
    hf-detrkd doctor --config recipe.yaml

`distill` and `evaluate` are started by accelerate, whose launch arguments (`--num_processes`, `--config_file`,
`--mixed_precision`, `--cpu`, `--main_process_port` and all others of `accelerate launch`) may stand anywhere among
theirs; an argument that both know is the script's. `--accelerate_config` takes a file, or the name of one in
scripts/accelerate_configs. `doctor` takes the arguments of `distill` and runs in one process. Everything behind a
command goes to the script of its name: `hf-detrkd distill --help` shows it.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser

import hf_detrkd

from .config import DistillationConfig
from .data import AugmentationConfig
from .methods import METHODS


COMMANDS = ("distill", "evaluate", "predict", "export", "push", "doctor", "benchmark")
LAUNCHED = ("distill", "evaluate")  # by accelerate
NOT_TAKEN = ("help", "module", "no_python", "training_script", "training_script_args")  # the script is known


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status; without a command, or with a wrong one, that is 2."""
    given = list(sys.argv[1:] if argv is None else argv)
    command, rest = (given[0], given[1:]) if given else (None, [])
    if command in (None, "-h", "--help"):
        print(overview())
        return 0 if given else 2
    if command == "--version":
        print(f"hf-detrkd {hf_detrkd.__version__}")
        return 0
    if command not in COMMANDS:
        print(unknown(str(command)), file=sys.stderr)
        return 2
    return start(str(command), rest)


def start(command: str, arguments: list[str]) -> int:
    """The exit status of a command's script."""
    script = script_of(command)
    launching, own = split_arguments(arguments) if command in (*LAUNCHED, "doctor") else (None, arguments)
    if command in LAUNCHED and not {"-h", "--help"} & set(own):
        return launch(script, launching, own)
    if command == "doctor" and own != arguments:
        print("The doctor runs in one process: arguments of `accelerate launch` are left out.", file=sys.stderr)
    try:
        return subprocess.run([sys.executable, str(script), *own], check=False).returncode
    except KeyboardInterrupt:  # the script was told too, and has said what it had to say
        return 130


def launch(script: Path, launching: argparse.Namespace | None, own: list[str]) -> int:
    """Runs a script as `accelerate launch` does."""
    if launching is not None and (vars(launching).get("num_processes") or 1) > 1 and vars(launching).pop("cpu", False):
        # With --cpu accelerate starts one process, except under MPI.
        launching.multi_gpu, own = True, [*own, "--use_cpu"]
    parsed = launch_command_parser().parse_args([str(script), *own], launching)
    try:
        launch_command(parsed)
    except subprocess.CalledProcessError as error:  # the script has printed its error itself
        return error.returncode
    except KeyboardInterrupt:
        return 130
    return 0


def split_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What `accelerate launch` takes of a command line, by its own parser, and the rest in its order."""
    own = {field.name for kind in argument_groups() for field in dataclasses.fields(kind)}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for action in launch_command_parser()._actions:
        if action.option_strings and action.dest not in NOT_TAKEN and action.dest not in own:
            action.default = argparse.SUPPRESS  # accelerate's own parser sets it
            parser._add_action(action)
    parser.add_argument("--accelerate_config", dest="config_file", type=config_file)  # as TRL calls it
    return parser.parse_known_args(arguments)


def config_file(name: str) -> str:
    """The file of a configuration that comes with the scripts, such as `multi_gpu`; else a path as it is."""
    ours = script_of("distill").parent / "accelerate_configs" / f"{name}.yaml"
    return str(ours) if ours.is_file() else name


def argument_groups() -> list[type]:
    """Dataclasses whose fields are arguments of the launched scripts, and may be called like accelerate's."""
    return [DistillationConfig, AugmentationConfig, *(method.config_class for method in METHODS.values())]


def script_of(command: str) -> Path:
    """The file of a command: inside the installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: it is in neither.
    """
    package = Path(hf_detrkd.__file__).parent
    places = [package / "scripts", package.parent / "scripts"]
    found = [folder / f"{command}.py" for folder in places if (folder / f"{command}.py").is_file()]
    if not found:
        raise FileNotFoundError(
            f"{command}.py must be in {places[0]} or {places[1]}, but is in neither: install hf-detrkd again."
        )
    return found[0]


def overview() -> str:
    """What `hf-detrkd --help` prints: every command with the first sentence of its script."""
    lines = ["usage: hf-detrkd [--help] [--version] COMMAND ...", "", "Commands:"]
    for command in COMMANDS:
        text = ast.get_docstring(ast.parse(script_of(command).read_text(encoding="utf-8"))) or ""
        lines.append(f"  {command:12}{text.splitlines()[0]}")
    behind = (__doc__ or "").partition("\n\n")[2].rstrip()
    return "\n".join([*lines, "", behind])


def unknown(command: str) -> str:
    """The sentence for a command that is none."""
    near = difflib.get_close_matches(command, COMMANDS, 1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}."
    return f"hf-detrkd has no command {command!r}: {hint}"


if __name__ == "__main__":
    sys.exit(main())
