"""transformers' loss of D-FINE and DEIMv2 without its known bug: predictions and distributions of the same layer."""

import functools
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.loss.loss_d_fine import DFineLoss


def aligned_parts(config: PreTrainedConfig, output: Any, labels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The weighted parts of transformers' own criterion of D-FINE or DEIMv2, with every layer's predictions paired
    with its own distributions, as in the authors' code: transformers pairs them with those of the next layer.

    Args:
        output: a model's output in training mode.
    """
    meta = output.denoising_meta_values
    guess, layers = _entries(output, meta and meta["dn_num_split"], 1)
    proposals = {"logits": output.enc_topk_logits, "pred_boxes": output.enc_topk_bboxes.clamp(0, 1)}
    outputs = layers[-1] | {"auxiliary_outputs": [guess, *layers[:-1], proposals]}
    if meta is not None:
        guess, layers = _entries(output, meta["dn_num_split"], 0)
        outputs |= {"dn_auxiliary_outputs": [guess, *layers], "denoising_meta_values": meta}
    criterion = _loss_class(config.model_type)(config)
    # DEIMv2's union of matches breaks ties with an unstable sort.
    with mock.patch("torch.argsort", functools.partial(torch.argsort, stable=True)):
        return criterion.to(proposals["logits"].device)(outputs, labels)


def _loss_class(model_type: str) -> type[DFineLoss]:
    if model_type == "d_fine":
        return DFineLoss
    from transformers.loss.loss_deimv2 import Deimv2Loss  # since transformers 5.7

    return Deimv2Loss


def _entries(output: Any, split: list[int] | None, part: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The first guess and the layers, of the denoising rows (part 0) or the model's own."""

    def rows(values: Tensor) -> Tensor:
        return values if split is None else values.split(split, dim=2)[part]

    logits, boxes = rows(output.intermediate_logits), rows(output.intermediate_reference_points).clamp(0, 1)
    corners, references = rows(output.intermediate_predicted_corners), rows(output.initial_reference_points)
    layers = [
        {
            "logits": logits[:, layer + 1],
            "pred_boxes": boxes[:, layer + 1],
            "pred_corners": corners[:, layer],
            "ref_points": references[:, layer],
            "teacher_corners": corners[:, -1],
            "teacher_logits": logits[:, -1],
        }
        for layer in range(corners.shape[1])
    ]
    return {"logits": logits[:, 0], "pred_boxes": boxes[:, 0]}, layers
