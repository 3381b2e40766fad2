"""`benchmark.py scale`: time and memory of the evaluator and of COCO files, by their size, each in its own process."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..shipped import PACKAGE
from . import scale_cases


HERE = PACKAGE.parent
Found = dict[str, dict[str, Any]]


def add_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        nargs="*",
        type=int,
        default=[1250, 5000, 20000],
        help="Images to evaluate. Default: 1250 5000 20000.",
    )
    parser.add_argument("--boxes", type=int, default=7, help="Ground-truth boxes per image. Default: 7.")
    parser.add_argument("--detections", type=int, default=100, help="Detections per image. Default: 100.")
    parser.add_argument("--classes", type=int, default=80, help="Number of classes. Default: 80.")
    parser.add_argument("--coco_images", type=int, default=118000, help="Images of the COCO file. Default: 118000.")
    parser.add_argument("--coco_boxes", type=int, default=860000, help="Its annotations; 0 for none. Default: 860000.")
    parser.add_argument("--beside", help="Folder of another checkout of this project, measured too. Default: none.")
    parser.set_defaults(run=scale)


def scale(given: argparse.Namespace) -> dict[str, Any]:
    """Prints the tables and returns their figures."""
    ours = {"hf_detrkd": HERE} | ({} if given.beside is None else {"beside": Path(given.beside)})
    evaluations: dict[str, Found] = {}
    for images in given.images:
        evaluations[str(images)] = evaluation(given, images, ours)
        print(f"{images} images, {given.detections} detections each\n{table(evaluations[str(images)])}\n", flush=True)
    loads = loading(given, ours) if given.coco_boxes else {}
    if loads:
        print(f"a COCO file of {given.coco_images} images and {given.coco_boxes} annotations\n{table(loads)}")
    return {"evaluation": evaluations, "loading": loads}


def evaluation(given: argparse.Namespace, images: int, ours: dict[str, Path]) -> Found:
    sizes = {"images": images, "boxes": given.boxes, "detections": given.detections, "classes": given.classes}
    found = {name: measure(given, "stream", checkout, **sizes) for name, checkout in ours.items()}
    found["faster-coco-eval, a dict per box"] = measure(given, "library", HERE, **sizes)
    if find_spec("hotcoco") is not None:
        found["hotcoco"] = measure(given, "hotcoco", HERE, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        measure(given, "write_files", HERE, folder=folder, **sizes)
        for name, checkout in ours.items():
            found[f"{name}, results file"] = measure(given, "files", checkout, folder=folder, **sizes)
    return found


def loading(given: argparse.Namespace, ours: dict[str, Path]) -> Found:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        measure(given, "write_coco", HERE, folder=folder, images=given.coco_images, boxes=given.coco_boxes)
        os.utime(Path(folder, "annotations", "instances_val.json"), (0, 0))  # a file of this moment has no index
        found = {"hf_detrkd, without an index": measure(given, "load", HERE, folder=folder, index=False)}
        for name in ("hf_detrkd, first time", "hf_detrkd, from the index"):
            found[name] = measure(given, "load", HERE, cache, folder=folder)
        if "beside" in ours:
            found["beside"] = measure(given, "load", ours["beside"], cache + "/beside", folder=folder)
    return found


def measure(given: argparse.Namespace, case: str, checkout: Path, cache: str = "", **arguments: Any) -> dict[str, Any]:
    """A case in a process of its own, with the package of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(given.threads)}
    if cache:
        environment["HF_DATASETS_CACHE"] = cache
    command = [sys.executable, "-P", scale_cases.__file__, case, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(found: Found) -> str:
    """Markdown: a row for each part of each measurement."""
    lines = ["| | | CPU s | peak memory, MB more |", "|---|---|---|---|"]
    for name, parts in found.items():
        for part, value in parts.items():
            if isinstance(value, dict):
                lines.append(f"| {name} | {part} | {value['seconds']:.1f} | {value['megabytes']:.0f} |")
    return "\n".join(lines)
