"""Input of `benchmark.py criterion`: random predictions of one family, for our loss and for transformers' own."""

import argparse
import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.loss import loss_rt_detr
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from ...adapters import ADAPTERS
from ...losses.criterion import Answers, Denoising
from ...losses.fine_grained import EdgeDistributions
from ...structures.outputs import Activation, Predictions
from ...structures.targets import BatchTotals, Targets
from .criterion_aligned import aligned_parts


RT_DETRS = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2")
GROUPED = ("lw_detr", "rf_detr")


def random_boxes(*shape: int, device: str) -> Tensor:
    sizes = torch.rand(*shape, 2, device=device) * 0.4 + 0.05
    return torch.cat([sizes / 2 + torch.rand(*shape, 2, device=device) * (1 - sizes), sizes], -1)


def drops_denoising() -> bool:
    """True if transformers drops the denoising queries from the last layer's loss of RT-DETR (its pull request 48528);
    earlier versions count them as predictions."""
    source = inspect.getsource(loss_rt_detr.RTDetrForObjectDetectionLoss)
    return source.count("denoising_meta_values is not None") > 2


class Case:
    """Random predictions of one family, as graph leaves, in the form of each of the two losses.

    Args:
        model_type (`str`)
        given (`argparse.Namespace`): sizes and device.
    """

    def __init__(self, model_type: str, given: argparse.Namespace):
        self.given, self.model_type = given, model_type
        fields: dict[str, Any] = {"auxiliary_loss": True, "num_labels": given.classes, "decoder_layers": given.layers}
        if model_type in ("conditional_detr", "dab-detr"):
            fields["cls_loss_coefficient"] = 1  # transformers ignores the default, 2
        if model_type in GROUPED:
            fields["group_detr"] = given.groups
        if model_type == "yolos":  # transformers has no auxiliary loss for YOLOS
            fields.pop("decoder_layers")
        self.config: PreTrainedConfig = AutoConfig.for_model(model_type, **fields)
        self.config.auxiliary_loss = model_type != "yolos"
        self.layers = given.layers if model_type != "yolos" else 1
        self.groups = given.groups if model_type in GROUPED else 1
        self.classes = given.classes + (model_type in ("detr", "table-transformer", "yolos"))
        device, batch, most = given.device, given.batch_size, given.boxes
        self.labels = [
            {
                "class_labels": torch.randint(0, given.classes, (most,), device=device),
                "boxes": random_boxes(most, device=device),
            }
            for _ in range(batch)
        ]
        self.denoising_groups = given.denoising // most if model_type in RT_DETRS else 0
        self.denoising_rows = 2 * most * self.denoising_groups
        own, extra = given.queries * self.groups, int(model_type in ("d_fine", "deimv2"))
        shape = (self.layers + extra, batch, self.denoising_rows + own)
        self.logits = torch.randn(*shape, self.classes, device=device).requires_grad_()
        self.boxes = random_boxes(*shape, device=device).requires_grad_()
        self.encoder_logits = torch.randn(batch, own, self.classes, device=device).requires_grad_()
        self.encoder_boxes = random_boxes(batch, own, device=device).requires_grad_()
        self.leaves = [self.logits, self.boxes]
        self.corners: Tensor | None = None
        self.references: Any = None  # a tensor if there are corners
        if model_type in RT_DETRS + GROUPED:
            self.leaves += [self.encoder_logits, self.encoder_boxes]
        if extra:
            bins = self.config.max_num_bins
            self.corners = torch.randn(self.layers, *shape[1:], 4 * (bins + 1), device=device).requires_grad_()
            self.references = random_boxes(*shape[1:], device=device)
            self.leaves.append(self.corners)

    # --- the two losses ----------------------------------------------------------------------------------------------

    def ours(self) -> Tensor:
        criterion = ADAPTERS[self.model_type].criterion_of(self.config)
        targets = Targets.from_labels(self.labels)
        totals = BatchTotals.of(targets.counts, self.given.queries)
        start = self.denoising_rows
        activation: Activation = "softmax" if self.classes > self.given.classes else "sigmoid"
        pairs = list(zip(self.logits.unbind(), self.boxes.unbind(), strict=True))

        def rows(part: slice) -> tuple[Predictions, ...]:
            return tuple(Predictions(z[:, part], b[:, part], None, activation) for z, b in pairs)

        two_stage = self.model_type in RT_DETRS + GROUPED
        answers = Answers(
            rows(slice(start, None)),
            self.groups,
            Predictions(self.encoder_logits, self.encoder_boxes) if two_stage else None,
            edges=self._edges(slice(start, None)),
        )
        if self.denoising_groups:
            part = slice(0, start)
            answers = replace(answers, denoising=Denoising(rows(part), self.denoising_groups, self._edges(part)))
        return torch.stack(list(criterion(answers, targets, totals).values())).sum()

    def _edges(self, part: slice) -> EdgeDistributions | None:
        if self.corners is None:
            return None
        logits = self.corners[:, :, part].unflatten(-1, (4, self.config.max_num_bins + 1))
        return EdgeDistributions(logits, self.references[:, part], self.config.up, self.config.reg_scale)

    def theirs(self, last: slice = slice(None)) -> Tensor:
        name = MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[self.model_type]
        loss = LOSS_MAPPING[name if name in LOSS_MAPPING else "ForObjectDetection"]
        logits, boxes = self.logits, self.boxes
        options: dict[str, Any] = {}
        if self.model_type in RT_DETRS:
            logits, boxes = logits.transpose(0, 1), boxes.transpose(0, 1)
            options = {"enc_topk_logits": self.encoder_logits, "enc_topk_bboxes": self.encoder_boxes}
            options["denoising_meta_values"] = self._denoising_meta()
        if self.model_type in GROUPED:
            options = {"enc_outputs_class": self.encoder_logits, "enc_outputs_coord": self.encoder_boxes}
        if self.corners is not None:
            options["predicted_corners"] = self.corners.transpose(0, 1)
            options["initial_reference_points"] = self.references[:, None].expand(-1, self.layers, -1, -1)
        device = torch.device(self.given.device)
        final = self.logits[-1][:, last], self.labels, device, self.boxes[-1][:, last]
        return loss(*final, self.config, logits, boxes, **options)[0]

    def right(self) -> Tensor:
        """transformers' loss without its known bugs."""
        if self.corners is None:
            denoises = self.model_type in RT_DETRS and not drops_denoising()
            return self.theirs(slice(self.denoising_rows, None) if denoises else slice(None))
        output = SimpleNamespace(
            intermediate_logits=self.logits.transpose(0, 1),
            intermediate_reference_points=self.boxes.transpose(0, 1),
            intermediate_predicted_corners=self.corners.transpose(0, 1),
            initial_reference_points=self.references[:, None].expand(-1, self.layers, -1, -1),
            enc_topk_logits=self.encoder_logits,
            enc_topk_bboxes=self.encoder_boxes,
            denoising_meta_values=self._denoising_meta(),
        )
        return torch.stack(list(aligned_parts(self.config, output, self.labels).values())).sum()

    def _denoising_meta(self) -> dict[str, Any] | None:
        most, groups = self.given.boxes, self.denoising_groups
        if not groups:
            return None
        positive = torch.cat([torch.arange(most) + 2 * most * g for g in range(groups)]).to(self.given.device)
        return {
            "dn_positive_idx": [positive] * self.given.batch_size,
            "dn_num_group": groups,
            "dn_num_split": [self.denoising_rows, self.given.queries],
        }
