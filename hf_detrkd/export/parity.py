"""Numerical parity check: compares ONNX Runtime outputs with PyTorch outputs, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert

from ..evaluation import detections_from_predictions, predictions_from_heads
from ..structures.outputs import Predictions
from .packages import onnxruntime


Heads = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images `(batch_size, 3, height, width)` to logits and boxes, as from a model of transformers."""

FAR = 1e6  # cost of a pair beyond the tolerance, to minimise the number of such pairs
CORNERS = ("cxcywh", "xyxy")
MOST_COMPARED = 100  # detections of an image that are compared, or as many as there are queries if these are more


class OnnxExportError(RuntimeError):
    """A detector cannot be exported to ONNX; the message gives the reason."""


class OnnxParityError(RuntimeError):
    """The outputs of an ONNX file differ from its detector's; the message names the image, the deviation and the
    tolerance."""


@dataclass(frozen=True)
class Tolerance:
    """Tolerated differences of outputs.

    Attributes:
        scores (`float`): in [0, 1].
        boxes (`float`): for each side of a box, in [0, 1] of the image.
        least_score (`float`): detections with a lower score on both sides are not compared. In 16 bits a two-stage
            detector selects other proposals among equally good ones, which detect nothing.
        others (`float`): fraction of the compared detections that may differ more, or exist on only one side: in 16
            bits the selection of proposals and NMS may differ because of the last digit.
    """

    scores: float
    boxes: float
    least_score: float = 0.0
    others: float = 0.0


FLOAT32 = Tolerance(scores=1e-4, boxes=1e-3)
FLOAT16 = Tolerance(scores=2e-2, boxes=1e-2, least_score=0.3, others=0.02)


@dataclass(frozen=True)
class Deviation:
    """Differences of the outputs for one image.

    Attributes:
        image (`str`): its name.
        batch_size (`int`): size of its batch.
        scores (`float`), boxes (`float`): largest absolute differences, in the units of [`Tolerance`].
        rows_agree (`bool`): row by row within the tolerance. Otherwise detections were paired, since a two-stage
            detector orders its queries by scores that may be almost equal.
        compared (`int`): rows, or pairs of detections, with at least the least score.
        unpaired (`int`): detections without a counterpart on the other side.
        beyond (`int`): those beyond the tolerance, including unpaired ones.
    """

    image: str
    batch_size: int
    scores: float
    boxes: float
    rows_agree: bool
    compared: int
    unpaired: int = 0
    beyond: int = 0

    def excess(self, tolerance: Tolerance) -> float:
        """The deviation relative to the tolerance: above 1 it is too large."""
        if self.unpaired:
            return float("inf")
        return max(self.scores / tolerance.scores, self.boxes / tolerance.boxes)


@dataclass(frozen=True)
class Parity:
    """All deviations of a file, of every image in every batch size."""

    deviations: Sequence[Deviation]
    tolerance: Tolerance

    @property
    def worst(self) -> Deviation:
        return max(self.deviations, key=lambda deviation: deviation.excess(self.tolerance))

    @property
    def compared(self) -> int:
        return sum(deviation.compared for deviation in self.deviations)

    @property
    def beyond(self) -> int:
        return sum(deviation.beyond for deviation in self.deviations)

    def raise_if_beyond(self) -> None:
        """
        Raises:
            OnnxParityError: too many detections are beyond the tolerance, or nothing could be compared.
        """
        worst, tolerance = self.worst, self.tolerance
        if self.beyond > tolerance.others * self.compared:
            unpaired = f" and {worst.unpaired} detections without counterpart" if worst.unpaired else ""
            raise OnnxParityError(
                f"onnxruntime must match PyTorch within {tolerance.scores:g} for scores and {tolerance.boxes:g} of "
                f"the image size for boxes, but {self.beyond} of {self.compared} detections differ more: "
                f"{worst.image} in a batch of {worst.batch_size} differs by {worst.scores:.3g} and "
                f"{worst.boxes:.3g}{unpaired}."
            )
        if not self.compared:
            raise OnnxParityError(
                f"The check needs images with detections of a score of at least {tolerance.least_score:g}, but there "
                "are none: use images with objects, or train the detector longer."
            )

    def as_dict(self) -> dict[str, Any]:
        """The largest deviations and their places, for JSON."""
        return {
            "scores": max(deviation.scores for deviation in self.deviations),
            "boxes": max(deviation.boxes for deviation in self.deviations),
            "tolerance": asdict(self.tolerance),
            "images": len({deviation.image for deviation in self.deviations}),
            "batch_sizes": sorted({deviation.batch_size for deviation in self.deviations}),
            "rows_agree": all(deviation.rows_agree for deviation in self.deviations),
            "compared": self.compared,
            "beyond": self.beyond,
            "unpaired": sum(deviation.unpaired for deviation in self.deviations),
            "worst": asdict(self.worst),
        }


def onnx_heads(file: str | Path, threads: int = 0) -> Heads:
    """An ONNX file as a function, on onnxruntime's CPU provider.

    Args:
        file (`str` or `Path`)
        threads (`int`): threads per operator; 0 for onnxruntime's default.

    Raises:
        OnnxExportError: onnxruntime cannot load the file; also raised by the function if it cannot run it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has many error types
        raise OnnxExportError(f"onnxruntime cannot load the file: {error}") from error

    def answer(pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        try:
            logits, boxes = session.run(["logits", "pred_boxes"], {"pixel_values": pixel_values.numpy()})
        except Exception as error:
            raise OnnxExportError(
                f"onnxruntime cannot run the file on images of shape {tuple(pixel_values.shape)}: {error}"
            ) from error
        return torch.from_numpy(logits), torch.from_numpy(boxes)

    return answer


def check_parity(
    expected: Heads,
    found: Heads,
    images: Mapping[str, Tensor],
    num_classes: int,
    batch_sizes: Sequence[int],
    tolerance: Tolerance = FLOAT32,
) -> Parity:
    """Compares the outputs of both sides for the same images in batches.

    Args:
        expected, found (`Heads`): PyTorch's model and the ONNX file.
        images (`dict[str, torch.Tensor]`): by name, of shape `(3, height, width)`, as the processor makes them.
        num_classes (`int`): number of classes, without no-object.
        batch_sizes (`list[int]`): every image is compared once in each; some are repeated to fill the last batch.
        tolerance ([`Tolerance`])
    """
    deviations: list[Deviation] = []
    for size in batch_sizes:
        for names in in_batches(list(images), size):
            pixels = torch.stack([images[name] for name in names])
            with torch.no_grad():
                answers = [predictions_from_heads(*side(pixels), num_classes) for side in (expected, found)]
            deviations += compare(answers[0], answers[1], names, tolerance)
    return Parity(deviations, tolerance)


def in_batches(names: list[str], size: int) -> Iterator[list[str]]:
    """Batches of exactly this size; the first names are repeated to fill the last one."""
    for start in range(0, len(names), size):
        yield [names[(start + offset) % len(names)] for offset in range(size)]


def compare(expected: Predictions, found: Predictions, names: Sequence[str], tolerance: Tolerance) -> list[Deviation]:
    """The deviation of every image of a batch.

    Raises:
        OnnxParityError: the shapes differ.
    """
    shapes = [(tuple(side.logits.shape), tuple(side.boxes.shape)) for side in (expected, found)]
    if shapes[0] != shapes[1]:
        raise OnnxParityError(
            f"Logits and boxes must have the shapes {shapes[0]}, but onnxruntime returns {shapes[1]}."
        )
    scores = _largest(expected.scores() - found.scores())
    boxes = _largest(box_convert(expected.boxes, *CORNERS) - box_convert(found.boxes, *CORNERS))
    whole = torch.ones(len(names), 2)  # boxes stay in [0, 1] of the image
    limit = max(MOST_COMPARED, expected.boxes.shape[1])
    pairs = zip(*(detections_from_predictions(side, whole, limit) for side in (expected, found)), strict=True)
    cut = expected.activation == "sigmoid" and limit < expected.logits[0].numel()
    deviations = []
    sure = (expected.scores().amax(-1) >= tolerance.least_score).sum(1).tolist()
    for name, count, score, box, (ours, theirs) in zip(names, sure, scores, boxes, pairs, strict=True):
        if score <= tolerance.scores and box <= tolerance.boxes:
            deviations.append(Deviation(name, len(names), score, box, True, count))
        else:
            deviations.append(Deviation(name, len(names), *_paired(ours, theirs, tolerance, cut)))
    return deviations


def _largest(differences: Tensor) -> list[float]:
    """The largest absolute value for each image; NaN counts as infinite."""
    return differences.float().abs().nan_to_num(nan=float("inf")).flatten(1).amax(1).tolist()


def _paired(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: Tolerance, cut: bool
) -> tuple[float, float, bool, int, int, int]:
    """Deviations of scores and boxes over the best pairs of one image's detections, false for `rows_agree`,
    and the numbers of compared pairs, of detections without a pair, and of all these beyond the tolerance. `cut`:
    there are more detections than those of the lists."""
    gaps = (ours["scores"][:, None] - theirs["scores"]).abs().nan_to_num(nan=FAR)
    shifts = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(-1).nan_to_num(nan=FAR)
    excess = torch.maximum(gaps / tolerance.scores, shifts / tolerance.boxes).clamp(max=FAR)
    strange = ours["labels"][:, None] != theirs["labels"]
    cost = excess + FAR * (excess > 1) + 3 * FAR * strange
    rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(cost.double().numpy()))
    likely = torch.maximum(ours["scores"][rows], theirs["scores"][columns])
    counted = likely.nan_to_num(nan=1.0) >= tolerance.least_score
    good = (excess[rows, columns] <= 1) & ~strange[rows, columns]
    if cut:  # the other list may end just before its counterpart
        counted &= good | (likely > torch.maximum(ours["scores"][-1], theirs["scores"][-1]) + tolerance.scores)
    alone = counted & strange[rows, columns]
    both = counted & ~strange[rows, columns]
    measured = [values[rows, columns][both].max().item() if both.any() else 0.0 for values in (gaps, shifts)]
    return measured[0], measured[1], False, int(counted.sum()), int(alone.sum()), int((counted & ~good).sum())
