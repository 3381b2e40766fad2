"""The metric during training: batches that `Trainer` and `accelerate` can gather, and metrics after the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction

from .figures import Curves


if TYPE_CHECKING:
    from .metric import CocoBoxMetric


PADDING = -100  # padding value of Trainer and accelerate; the label of a padded row


def gatherable(
    detections: Sequence[Mapping[str, Tensor]], references: Sequence[Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pads a batch into the predictions and labels that `prediction_step` returns.

    `Trainer` pads the second dimension over processes with -100, concatenates the first and cuts off the images that
    the sampler repeated: tensors of shape `(batch_size, num_boxes, ...)` pass through it unchanged, on any
    backend. Lists of dicts would need `eval_use_gather_object`, which `Trainer` forgets after its first evaluation:
    the second one hangs. Nothing here waits for the device.

    Args:
        detections (`list[dict[str, torch.Tensor]]`): see [`detections_from_predictions`].
        references (`list[dict[str, torch.Tensor]]`): see [`references_from_labels`].

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]`: the same fields; a row with label -100 is padding.
    """
    fields = ("boxes", "labels", "area", "iscrowd")
    truth = {name: _pad([reference[name] for reference in references]) for name in fields}
    truth["image_id"] = torch.stack([reference["image_id"] for reference in references])
    return {name: _pad([image[name] for image in detections]) for name in ("boxes", "labels", "scores")}, truth


def _pad(rows: Sequence[Tensor]) -> Tensor:
    """`(batch_size, num_rows, ...)`, at least one row wide, since not every backend gathers empty tensors."""
    least = rows[0].new_zeros(1, *rows[0].shape[1:])
    return pad_sequence([*rows, least], batch_first=True, padding_value=PADDING)[:-1]


def unpadded(batch: Mapping[str, Tensor | np.ndarray], image_ids: np.ndarray) -> list[dict[str, Any]]:
    """One dict of arrays per image, without padding."""
    fields = {name: torch.as_tensor(value).cpu().numpy() for name, value in batch.items() if name != "image_id"}
    keep = fields["labels"] != PADDING
    return [
        {"image_id": int(image_id), **{name: value[i][keep[i]] for name, value in fields.items()}}
        for i, image_id in enumerate(image_ids)
    ]


class CocoEvaluator:
    """`compute_metrics` of a `Trainer` with `batch_eval_metrics=True`: adds batches, returns metrics after the last.

    `batch_eval_metrics=True` enables streaming; without it `Trainer` keeps all padded batches and calls once at the
    end. `eval_use_gather_object` and `eval_do_concat_batches` must keep their defaults. With several processes the
    first one stores the detections and computes; all return the same metrics, since each selects the best checkpoint.

    Args:
        id2label (`dict[int, str]`): the model's classes, as in its config.

    Attributes:
        precision (`dict[str, dict[str, list[float]]]`): that of [`CocoBoxMetric`] at the last computation, on the
            process that computes. Elsewhere, and before, it is empty.

    Example:

    ```python
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        ...
        sizes = torch.stack([x["orig_size"] for x in labels])
        detections = detections_from_predictions(predictions, sizes, max_detections_of(model.config))
        return loss, *gatherable(detections, references_from_labels(labels))
    ```
    """

    def __init__(self, id2label: Mapping[int, str]):
        self.id2label = dict(id2label)
        self.metric: CocoBoxMetric | None = None
        self.precision: Curves = {}

    def reset(self) -> None:
        """Discards the batches of an interrupted evaluation."""
        if self.metric is not None:
            self.metric.close()
        self.metric = None

    def __call__(self, evaluation: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Adds a batch, the same in every process; with `compute_result` returns the metrics of all batches.

        Raises:
            ValueError: the predictions are not in the form of [`gatherable`].
        """
        if not isinstance(evaluation.predictions, Mapping) or not isinstance(evaluation.label_ids, Mapping):
            raise ValueError(
                "predictions and labels must be the padded tensors of `gatherable`, got "
                f"{type(evaluation.predictions).__name__} and {type(evaluation.label_ids).__name__}: return them from "
                "`prediction_step` and leave `eval_use_gather_object` off"
            )
        several = dist.is_available() and dist.is_initialized()
        main = not several or dist.get_rank() == 0
        figures: list[dict[str, float] | None] = [None]
        if main:
            from .metric import CocoBoxMetric  # loads evaluate and the COCO library

            self.metric = CocoBoxMetric(self.id2label) if self.metric is None else self.metric
            image_ids = torch.as_tensor(evaluation.label_ids["image_id"]).cpu().numpy()
            self.metric.add_batch(
                predictions=unpadded(evaluation.predictions, image_ids),
                references=unpadded(evaluation.label_ids, image_ids),
            )
            if compute_result:
                figures[0] = self.metric.compute()
                self.precision = self.metric.precision
                self.reset()
        if several and compute_result:
            dist.broadcast_object_list(figures, src=0)
        return figures[0] or {}
