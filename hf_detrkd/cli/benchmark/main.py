"""Benchmarks of the detection loss, the distillation methods, detector latency, and what grows with a data set.

    hf-detrkd benchmark criterion
    hf-detrkd benchmark criterion --families lw_detr deimv2 --device cuda --output_file criterion.json
    hf-detrkd benchmark methods --output_dir outputs/methods --seeds 0 1 2 --jobs 2
    hf-detrkd benchmark methods --output_dir outputs/methods --only_cost
    hf-detrkd benchmark operations --output_dir outputs/operations
    hf-detrkd benchmark latency --models outputs/teacher outputs/student --image_size 640
    hf-detrkd benchmark pipeline --dataset_name path/to/folder
    hf-detrkd benchmark streaming --rows 100000
    hf-detrkd benchmark scale --beside path/to/another/checkout

`criterion`: forward and backward time of the detection loss, ours and transformers' own, on the same random
predictions of every family (six decoder layers, encoder proposals, denoising rows and query groups as in training),
and both loss values. Times are medians; both sides are measured in turns, so their ratio is reliable.

`methods`: the control, extra queries without a teacher, and every method on one data set, teacher and student: the
cost of a step and its parts, and the mAP over several seeds, at equal steps and at equal seconds.

`operations`: the operations of a training step of every method, of its parts, and how often the device has to answer
before the host goes on. They do not depend on the machine; on a GPU a step of a small model takes as long as it has
operations.

`latency`: parameters, operations, latency and throughput of detectors on this device, measured in turns.

`pipeline`: images a second of a core from the file to the batch, with and without augmentation, beside torchvision's
detection reference and transformers' example (albumentations and an image processor), in turns.

`streaming`: images a second and memory of one pass over generated Parquet files, as a stream and prepared on the disk.

`scale`: CPU time and memory of the evaluator by the number of images, beside the COCO library by itself, and of
loading a COCO file as large as COCO's own; of another checkout, too.
"""

import argparse
import json
from pathlib import Path

import torch

from ..shipped import shipped
from .criterion import FAMILIES, criterion
from .latency import add_latency
from .methods import methods
from .operations import operations
from .pipeline import add_pipeline
from .scale import add_scale
from .streaming import add_streaming


def add_criterion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--families",
        nargs="+",
        default=FAMILIES,
        choices=FAMILIES,
        metavar="FAMILY",
        help="Detector families to measure. Default: all.",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="Images per batch. Default: 8.")
    parser.add_argument("--queries", type=int, default=300, help="Queries per image and group. Default: 300.")
    parser.add_argument("--boxes", type=int, default=20, help="Number of boxes per image. Default: 20.")
    parser.add_argument("--layers", type=int, default=6, help="Decoder layers. Default: 6.")
    parser.add_argument("--classes", type=int, default=80, help="Number of classes. Default: 80.")
    parser.add_argument(
        "--denoising", type=int, default=100, help="Denoising queries of RT-DETR-like families. Default: 100."
    )
    parser.add_argument("--groups", type=int, default=13, help="Query groups of LW-DETR and RF-DETR. Default: 13.")
    parser.add_argument("--repeats", type=int, default=5, help="Timed passes; their median is reported. Default: 5.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="Device to measure on. Default: cpu.")
    parser.set_defaults(run=criterion)


def add_variants(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variants",
        default=str(shipped("scripts/recipes/methods.yaml")),
        help="YAML file of variants, as for ablate.py.",
    )
    parser.add_argument(
        "--only", nargs="*", help="Names of the variants to run; the first is the control. Default: all."
    )
    parser.add_argument("--output_dir", required=True, help="Output folder; runs with results in it are not repeated.")
    parser.set_defaults(threads=2)


def add_operations(parser: argparse.ArgumentParser) -> None:
    add_variants(parser)
    parser.set_defaults(run=operations)


def add_methods(parser: argparse.ArgumentParser) -> None:
    add_variants(parser)
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of the runs of each variant. Default: 0 1 2."
    )
    parser.add_argument("--jobs", type=int, default=1, help="Number of parallel runs. Default: 1.")
    parser.add_argument(
        "--cost_steps", type=int, default=15, help="Timed steps; their median is the cost. Default: 15."
    )
    parser.add_argument("--only_cost", action="store_true", help="Only measure the cost of a step.")
    parser.set_defaults(run=methods)


COMMANDS = {
    "criterion": (add_criterion, "Compare the detection loss with transformers' own."),
    "methods": (add_methods, "Compare every method with its controls."),
    "latency": (add_latency, "Compare detectors: parameters, GFLOPs, latency."),
    "operations": (add_operations, "Count the operations of every method's step."),
    "pipeline": (add_pipeline, "Compare the reading of images with two other pipelines."),
    "streaming": (add_streaming, "Compare a stream with the same data set on the disk."),
    "scale": (add_scale, "Measure the evaluator and the loading of COCO files by their size."),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-detrkd benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (add_arguments, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        command.add_argument("--threads", type=int, default=1, help="CPU threads. Default: %(default)s.")
        command.add_argument("--output_file", help="JSON file for the figures. Default: none.")
        add_arguments(command)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    results = given.run(given)
    if given.output_file:
        Path(given.output_file).write_text(json.dumps(results, indent=2))
