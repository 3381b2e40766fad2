"""`hf-detrkd`: every script of this package as one command.

    hf-detrkd distill --config recipe.yaml --num_processes 4
    hf-detrkd doctor --config recipe.yaml

`distill`, `answer` and `evaluate` are started by accelerate: the arguments of `accelerate launch` (`--num_processes`,
`--config_file`, `--mixed_precision`, `--cpu`, `--main_process_port` and all others) may stand anywhere among theirs;
an argument that both know belongs to the command. `--accelerate_config` takes a file or the name of one in
scripts/accelerate_configs. `answer` and `doctor` take the arguments of `distill`; `doctor` runs in one process.
`hf-detrkd distill --help` lists the arguments of a command.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import subprocess
import sys
from collections.abc import Sequence

import hf_detrkd

from .help import HELP
from .nearest import nearest
from .screen import run
from .shipped import shipped


# Module and summary; the modules are imported only when their command runs.
COMMANDS = {
    "distill": ("hf_detrkd.cli.distill", "Distils a detector into a smaller one, or trains one without a teacher."),
    "answer": ("hf_detrkd.cli.answer", "Stores a teacher's answers, which a training reads in its place."),
    "evaluate": ("hf_detrkd.cli.evaluate", "Evaluates a detector on a data set by COCO's metrics."),
    "predict": ("hf_detrkd.cli.predict", "Detects objects in images and draws them."),
    "demo": ("hf_detrkd.cli.demo.main", "Shows student and teacher side by side on a page in the browser."),
    "export": ("hf_detrkd.cli.export", "Exports a detector to ONNX and compares the file with PyTorch."),
    "push": ("hf_detrkd.cli.push", "Pushes the output folder of a run to the Hub."),
    "doctor": ("hf_detrkd.cli.doctor.main", "Checks data, models, memory and disk of a run without training."),
    "recipes": ("hf_detrkd.cli.recipes", "Lists the recipes that come with the package, by the name for --config."),
    "benchmark": ("hf_detrkd.cli.benchmark.main", "Measures losses, methods and latencies."),
}
LAUNCHED = ("distill", "answer", "evaluate")  # by accelerate
NOT_TAKEN = ("help", "module", "no_python", "training_script", "training_script_args")  # set by this command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status; without a command or with an unknown one, that is 2."""
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
    """Runs a command, by accelerate or in this process, and returns its exit status."""
    module = COMMANDS[command][0]
    helps = HELP & set(arguments)
    launching, own = split_arguments(arguments) if command in (*LAUNCHED, "doctor") else (None, arguments)
    if command in LAUNCHED and not helps:
        return launch(module, launching, own)
    if command == "doctor" and own != arguments:
        print("The doctor runs in one process: the arguments of `accelerate launch` are ignored.", file=sys.stderr)
    return run(lambda words: importlib.import_module(module).main(words), own)  # whose import may lack an extra


def launch(module: str, launching: argparse.Namespace | None, own: list[str]) -> int:
    """Runs the module of a command as `accelerate launch` does."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # accelerate lists the defaults that it takes: they are ours.
    logging.getLogger("accelerate.commands.launch").addFilter(
        lambda record: "not passed to" not in record.getMessage()
    )
    if launching is not None and (vars(launching).get("num_processes") or 1) > 1 and vars(launching).pop("cpu", False):
        # With --cpu accelerate starts one process, except under MPI.
        launching.multi_gpu, own = True, [*own, "--use_cpu"]
    parsed = launch_command_parser().parse_args(["--module", module, *own], launching)
    try:
        launch_command(parsed)
    except subprocess.CalledProcessError as error:  # the command has printed its error itself
        return error.returncode
    except ChildFailedError as error:  # one of several processes
        told = {rank: one for rank, one in error.failures.items() if isinstance(one.message, dict)}
        rank, failure = next(iter(told.items()), error.get_first_failure())
        said = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        print(f"[process {rank}] failed first: {said}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    except KeyboardInterrupt:
        return 130
    return 0


def split_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separates the arguments of `accelerate launch`, by its own parser, from the rest in its order."""
    from accelerate.commands.launch import launch_command_parser

    own = {field.name for kind in argument_groups() for field in dataclasses.fields(kind)}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for action in launch_command_parser()._actions:
        if action.option_strings and action.dest not in NOT_TAKEN and action.dest not in own:
            action.default = argparse.SUPPRESS  # accelerate's own parser sets it
            parser._add_action(action)
    parser.add_argument("--accelerate_config", dest="config_file", type=config_file)  # as TRL calls it
    return parser.parse_known_args(arguments)


def config_file(name: str) -> str:
    """The file of a configuration that comes with the package, such as `multi_gpu`; any other path unchanged."""
    ours = shipped(f"scripts/accelerate_configs/{name}.yaml")
    return name if ours is None else str(ours)


def argument_groups() -> list[type]:
    """Dataclasses whose fields are arguments of the launched commands and may be named like accelerate's."""
    from ..data import AugmentationConfig
    from ..methods import METHODS
    from ..training.config import DistillationConfig

    return [DistillationConfig, AugmentationConfig, *(method.config_class for method in METHODS.values())]


def overview() -> str:
    """The text of `hf-detrkd --help`: every command with its summary."""
    lines = ["usage: hf-detrkd [--help] [--version] COMMAND ...", "", "Commands:"]
    lines += [f"  {command:12}{summary}" for command, (_, summary) in COMMANDS.items()]
    details = (__doc__ or "").partition("\n\n")[2].rstrip()
    return "\n".join([*lines, "", details])


def unknown(command: str) -> str:
    """The error message for an unknown command, with the nearest one."""
    hint = nearest(command, COMMANDS, f"choose one of {', '.join(COMMANDS)}.")
    return f"hf-detrkd has no command {command!r}: {hint}"
