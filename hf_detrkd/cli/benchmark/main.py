"""Measures what this package claims, side by side in one run.

    python scripts/benchmark.py criterion
    python scripts/benchmark.py criterion --families lw_detr deimv2 --device cuda --output_file criterion.json
    python scripts/benchmark.py methods --output_dir outputs/methods --seeds 0 1 2 --jobs 2
    python scripts/benchmark.py methods --output_dir outputs/methods --only_cost
    python scripts/benchmark.py latency --models outputs/teacher outputs/student --image_size 640

`criterion`: forward and backward of the detection loss, ours against transformers' own, on the same random answers of
every family (six decoder layers, encoder proposals, denoising rows and query groups as in training), with the values
of both. Times are medians; read the ratios, since both sides are measured in turns.

`methods`: the control, extra queries without a teacher, and every method on one data set, teacher and student: what a
step costs and where, and the mAP over several seeds, at equal steps and at equal seconds.

`latency`: parameters, operations, latency and throughput of detectors on the present device, in turns.
"""

import argparse
import json
from pathlib import Path

import torch

from ..shipped import shipped
from .criterion import FAMILIES, criterion
from .latency import add_latency
from .methods import methods


def add_criterion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES, metavar="FAMILY")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--boxes", type=int, default=20, help="Per image.")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--denoising", type=int, default=100, help="Denoising queries of the RT-DETR line.")
    parser.add_argument("--groups", type=int, default=13, help="Query groups of LW-DETR and RF-DETR.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output_file", help="JSON file for the figures.")
    parser.set_defaults(run=criterion)


def add_methods(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variants", default=str(shipped("scripts/recipes/methods.yaml")), help="YAML file as of ablate.py."
    )
    parser.add_argument("--only", nargs="*", help="Names of the variants to run; default: all. The first is control.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="Runs at the same time.")
    parser.add_argument("--output_dir", required=True, help="Runs whose results are there are not run again.")
    parser.add_argument("--cost_steps", type=int, default=15, help="Steps of which the cost is the median.")
    parser.add_argument("--only_cost", action="store_true", help="Measure the cost of a step alone.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the cost's measurement.")
    parser.add_argument("--output_file", help="JSON file for the figures.")
    parser.set_defaults(run=methods)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_criterion(commands.add_parser("criterion", help="The detection loss against transformers' own."))
    add_methods(commands.add_parser("methods", help="Every method against its controls."))
    add_latency(commands.add_parser("latency", help="Detectors side by side: parameters, GFLOPs, latency."))
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    results = given.run(given)
    if given.output_file:
        Path(given.output_file).write_text(json.dumps(results, indent=2))
