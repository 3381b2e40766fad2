"""Exports a detector to ONNX for onnxruntime, and checks that its outputs match PyTorch.

    hf-detrkd export --model_name_or_path outputs/student --output_dir outputs/onnx --input photos

    hf-detrkd export --model_name_or_path outputs/student --output_dir outputs/onnx --fp16

Writes `model.onnx` (and `model_fp16.onnx`), its image processor and config, and `export.json` with sizes, latencies
and deviations from PyTorch. A file beyond the tolerance is kept as `model.failed.onnx`, and the command fails.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel

from ..data import load_detection_split, parse_image_size
from ..data.images import read_image
from ..evaluation.efficiency import device_name, figures_of, time_in_turns
from ..export.checked import export_checked, fixed_size_processor, megabytes, pixels_of, torch_heads
from ..export.parity import onnx_heads
from ..models.loading import load_detector, load_processor
from .parser import make_parser
from .predict import find_images, place_in


PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass
class ExportArguments:
    """The model to export, and options of the export and its check."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the detector."})
    output_dir: str = field(metadata={"help": "Folder for model.onnx, processor, config and report."})
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the model on the Hub. Default: main."}
    )
    image_size: str | None = field(
        default=None,
        metadata={
            "help": "Size of the images in pixels, 640 or 480x640 (height x width), to which they are stretched "
            "without padding. Default: the image processor's; required if that keeps the aspect ratio."
        },
    )
    opset: int | None = field(
        default=None,
        metadata={"help": "Version of the ONNX operator set, 18 or more. Default: that of torch's exporter."},
    )
    fp16: bool = field(
        default=False,
        metadata={"help": "Also write model_fp16.onnx, in 16 bits except inputs and outputs. Default: false."},
    )
    input: str | None = field(
        default=None, metadata={"help": "Image file or folder for the comparison. Default: generated images."}
    )
    num_images: int = field(default=8, metadata={"help": "Maximum number of images to compare. Default: 8."})
    batch_size: int = field(
        default=8, metadata={"help": "Batch size of the second latency; the first is 1. Default: 8."}
    )
    runs: int = field(default=20, metadata={"help": "Timed passes of each file; 0 disables timing. Default: 20."})
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads of PyTorch and onnxruntime. Default: PyTorch's."}
    )

    def __post_init__(self) -> None:
        parse_image_size(self.image_size)
        if self.opset is not None and self.opset < 18:
            raise ValueError(f"--opset must be 18 or more, as torch's exporter requires, got {self.opset}.")
        for name in ("num_images", "batch_size", "threads"):
            if vars(self)[name] is not None and vars(self)[name] < 1:
                raise ValueError(f"--{name} must be 1 or more, got {vars(self)[name]}.")
        if self.runs < 0 or self.runs == 1:
            raise ValueError(f"--runs must be 2 or more, or 0 for no latency, got {self.runs}.")
        if Path(self.output_dir).resolve() == Path(self.model_name_or_path).resolve():
            raise ValueError(
                f"--output_dir must not be the model's folder, whose processor may change, got {self.output_dir}."
            )


def load_images(source: str | None, count: int, image_size: tuple[int, int]) -> dict[str, Image.Image]:
    """The images for the comparison, by name: the given ones, or generated ones of the exported size."""
    if source is not None:
        return {
            str(place_in(Path(source), file)): read_image(file, str(file))
            for file in find_images(Path(source))[:count]
        }
    records = load_detection_split("shapes", max_samples=count, shapes_size=image_size).records
    return {record.name: record.load() for record in records}


def latencies(model: PreTrainedModel, folder: Path, report: dict[str, Any], given: ExportArguments) -> dict[str, Any]:
    """Latency of PyTorch and of each file in onnxruntime, by name and batch size."""
    sides = {"pytorch": torch_heads(model)}
    sides |= {name: onnx_heads(folder / name, torch.get_num_threads()) for name in report["files"]}
    height, width = report["image_size"]
    sizes = sorted({1, given.batch_size}) if given.runs else []
    found: dict[str, dict[str, Any]] = {name: {} for name in sides}
    for size in tqdm(sizes, desc="Timing", leave=False):
        pixels = torch.rand(size, 3, height, width, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            times = time_in_turns([partial(side, pixels) for side in sides.values()], given.runs)
        for name, seen in zip(sides, times, strict=True):
            found[name][str(size)] = figures_of(seen, size)
    return found


def summary(report: dict[str, Any]) -> str:
    """Sizes, latencies and deviations as text."""
    lines = [f"PyTorch: {report['pytorch']['megabytes']:.1f} MB{_speed(report['pytorch']['latency'])}"]
    for name, file in report["files"].items():
        parity = file["parity"]
        lines.append(f"{name}: {file['megabytes']:.1f} MB{_speed(file['latency'])}")
        lines.append(
            f"  matches PyTorch on {parity['images']} images in batches of "
            f"{' and '.join(map(str, parity['batch_sizes']))}: scores within {parity['scores']:.1e}, boxes within "
            f"{parity['boxes']:.1e} of the image"
            + (f"; {parity['beyond']} of {parity['compared']} differ more" if parity["beyond"] else "")
        )
    return "\n".join(lines)


def _speed(latency: dict[str, dict[str, float]]) -> str:
    """Median and quartiles for each batch size."""
    return "".join(
        f"; batch {size}: {x['median_ms']:.1f} ms ({x['low_ms']:.1f} to {x['high_ms']:.1f})"
        for size, x in latency.items()
    )


def main(argv: list[str]) -> None:
    parser = make_parser(ExportArguments, __doc__, prog="hf-detrkd export")
    (given,) = parser.parse_args_into_dataclasses(args=argv)
    torch.set_num_threads(given.threads or torch.get_num_threads())
    name, revision = given.model_name_or_path, given.model_revision
    model = load_detector(name, revision=revision).eval()
    processor = load_processor(name, revision=revision)
    processor, size = fixed_size_processor(processor, parse_image_size(given.image_size))
    images = pixels_of(processor, load_images(given.input, given.num_images, size), size)
    folder = Path(given.output_dir)
    report = {"model": name, "family": model.config.model_type, "parameters": model.num_parameters()}
    report |= export_checked(model, folder, images, given.opset, given.fp16, torch.get_num_threads())
    processor.save_pretrained(folder)
    model.config.save_pretrained(folder)
    timed = latencies(model, folder, report, given)
    report["pytorch"] = {"megabytes": megabytes(model), "latency": timed.pop("pytorch")}
    for file, latency in timed.items():
        report["files"][file]["latency"] = latency
    report |= {"threads": torch.get_num_threads(), "machine": device_name("cpu")}
    report["versions"] = {package: version(package) for package in PACKAGES}
    (folder / "export.json").write_text(json.dumps(report, indent=1) + "\n")
    print(summary(report))
