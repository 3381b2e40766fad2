"""Runs detectors on one image: their detections, latencies, and pictures for the page of the demo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters import class_names
from ...artifacts.draw_boxes import Color, class_colors, draw_detections
from ...evaluation.efficiency import device_name, figures_of, nothing, time_in_turns
from ...models.loading import load_detector, load_processor
from ..predict import above, detections_of


PASSES = 3  # timed forward passes of each detector
SIDE = 800  # longer side of a picture in pixels: names stay readable when the page shrinks it
BOXES = ("Model", "Class", "Score", "x min", "y min", "x max", "y max")


@dataclass(frozen=True)
class LoadedDetector:
    """A detector of the page.

    Attributes:
        title (`str`): its role, such as Student.
        name (`str`): Hub id or folder.
        revision (`str`): branch, tag or commit on the Hub.
        model ([`~transformers.PreTrainedModel`]): in eval mode.
        processor: its image processor.
    """

    title: str
    name: str
    revision: str
    model: PreTrainedModel
    processor: Any

    @classmethod
    def load(cls, title: str, name: str, revision: str = "main", device: str | None = None) -> LoadedDetector:
        """Loads a detector and its image processor; the default device is a GPU, if any."""
        model = load_detector(name, revision=revision)
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        return cls(title, name, revision, model, load_processor(name, revision=revision))


@dataclass(frozen=True)
class Result:
    """Detections of one detector in one image.

    Attributes:
        title (`str`): the detector's role.
        parameters (`int`): of the detector.
        names (`list[str]`): its classes.
        found (`dict[str, torch.Tensor]`): `boxes` (x_min, y_min, x_max, y_max in pixels), `labels` and `scores`.
        milliseconds (`float`): median forward pass.
        device (`str`): the hardware.
    """

    title: str
    parameters: int
    names: list[str]
    found: dict[str, Tensor]
    milliseconds: float
    device: str


def compare(detectors: Sequence[LoadedDetector], image: Image.Image) -> list[Result]:
    """Runs the detectors on an image and times their forward passes in turns.

    Args:
        detectors (`list[LoadedDetector]`)
        image (`PIL.Image.Image`): RGB.

    Returns:
        `list[Result]`: one for each detector, with detections of any score.
    """
    outputs: dict[int, Any] = {}
    passes = [_forward_pass(detector, image, place, outputs) for place, detector in enumerate(detectors)]
    with torch.inference_mode():
        times = time_in_turns(passes, PASSES)
    return [
        _result(detector, image, outputs[place], figures_of(seconds, 1)["median_ms"])
        for place, (detector, seconds) in enumerate(zip(detectors, times, strict=True))
    ]


def _result(detector: LoadedDetector, image: Image.Image, outputs: Any, milliseconds: float) -> Result:
    model = detector.model
    (found,) = detections_of(model, outputs, [image])
    names, device = class_names(model.config), device_name(model.device)
    return Result(detector.title, model.num_parameters(), names, found, milliseconds, device)


def _forward_pass(
    detector: LoadedDetector, image: Image.Image, place: int, outputs: dict[int, Any]
) -> Callable[[], None]:
    """A forward pass of the detector, which leaves its outputs under `place`."""
    inputs = detector.processor(images=[image], return_tensors="pt").to(detector.model.device)
    wait = nothing if detector.model.device.type == "cpu" else torch.accelerator.synchronize

    def one() -> None:
        outputs[place] = detector.model(**inputs)
        wait()

    return one


def colors_of(detectors: Sequence[LoadedDetector]) -> dict[str, Color]:
    """One colour per class name, the same for all detectors."""
    return class_colors(dict.fromkeys(name for detector in detectors for name in class_names(detector.model.config)))


def picture(result: Result, image: Image.Image, threshold: float, colors: Mapping[str, Color]) -> Image.Image:
    """The image with the detections whose score is at least the threshold, at most 800 pixels wide and high."""
    kept, scale = above(result.found, threshold), min(1.0, SIDE / max(image.size))
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    labels = [result.names[number] for number in kept["labels"].tolist()]
    return draw_detections(small, kept["boxes"] * scale, labels, kept["scores"], colors)


def figures(results: Sequence[Result], threshold: float) -> str:
    """Parameters, latency and number of objects of every detector, as a table in Markdown."""
    rows = {
        "": [one.title for one in results],
        "---": ["---"] * len(results),
        "Parameters": [f"{one.parameters / 1e6:.2f} M" for one in results],
        "Latency": [f"{one.milliseconds:.1f} ms" for one in results],
        "Objects": [str(len(above(one.found, threshold)["scores"])) for one in results],
    }
    lines = [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]
    how = f"Latency: median of {PASSES} forward passes of this image in float32 on {results[0].device}."
    return "\n".join([*lines, "", how])


def boxes(results: Sequence[Result], threshold: float) -> list[list[str]]:
    """The rows of the table of detections, see `BOXES`; the best of each detector first, in pixels of the image."""
    rows = []
    for result in results:
        kept = above(result.found, threshold)
        for i in kept["scores"].argsort(descending=True, stable=True).tolist():
            corners = [f"{value:.0f}" for value in kept["boxes"][i].tolist()]
            rows.append([result.title, result.names[int(kept["labels"][i])], f"{kept['scores'][i]:.2f}", *corners])
    return rows
