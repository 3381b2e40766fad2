"""`benchmark.py criterion`: the detection loss, ours against transformers' own, on the same random answers."""

import argparse
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig
from transformers.loss.loss_d_fine import DFineLoss
from transformers.loss.loss_deimv2 import Deimv2Loss
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from hf_detrkd.adapters import ADAPTERS
from hf_detrkd.criterion import Answers, Denoising
from hf_detrkd.distributions import EdgeDistributions
from hf_detrkd.outputs import Predictions
from hf_detrkd.targets import BatchTotals, Targets


RT_DETRS = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2")
GROUPED = ("lw_detr", "rf_detr")
FAMILIES = [name for name in ADAPTERS if name in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES]  # transformers' own


def random_boxes(*shape: int, device: str) -> Tensor:
    sizes = torch.rand(*shape, 2, device=device) * 0.4 + 0.05
    return torch.cat([sizes / 2 + torch.rand(*shape, 2, device=device) * (1 - sizes), sizes], -1)


class Case:
    """Random answers of one family, as leaves of a graph, in the form that each of the two losses takes.

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
        if model_type == "yolos":  # transformers knows no auxiliary loss of YOLOS
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
        self.corners = self.references = None
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
        start, activation = self.denoising_rows, "softmax" if self.classes > self.given.classes else "sigmoid"
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

    def theirs(self) -> Tensor:
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
        return loss(self.logits[-1], self.labels, device, self.boxes[-1], self.config, logits, boxes, **options)[0]

    def right(self) -> Tensor:
        """What transformers' loss would be without its known faults."""
        if self.corners is None:
            return self.theirs()
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


# --- transformers' loss without its known fault ----------------------------------------------------------------------


def aligned_parts(config: PreTrainedConfig, output: Any, labels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The weighted parts of transformers' own criterion of D-FINE or DEIMv2, given every layer's answers beside its
    own distributions, as the authors have it: transformers pairs the answers of each layer with the next one's.

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
    criterion = {"d_fine": DFineLoss, "deimv2": Deimv2Loss}[config.model_type](config)
    # DEIMv2's union of matches breaks ties by a sort that is not stable.
    with mock.patch("torch.argsort", functools.partial(torch.argsort, stable=True)):
        return criterion.to(proposals["logits"].device)(outputs, labels)


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


# --- measuring -------------------------------------------------------------------------------------------------------


def seconds(loss: Callable[[], Tensor], leaves: list[Tensor], device: str) -> tuple[float, float]:
    """Time of one forward and backward pass, and the loss."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    value = loss()
    torch.autograd.grad(value, leaves, allow_unused=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, value.item()


def synchronizations(loss: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    """How often a step waits for the GPU, as torch itself reports it."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.autograd.grad(loss(), leaves, allow_unused=True)
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def measure(model_type: str, given: argparse.Namespace) -> dict[str, Any]:
    """Both losses in turns on the same answers."""
    torch.manual_seed(0)
    case = Case(model_type, given)
    times: dict[str, list[float]] = {"ours": [], "transformers": []}
    values = {}
    for step in range(given.repeats + 1):
        for name, loss in (("ours", case.ours), ("transformers", case.theirs)):
            elapsed, values[name] = seconds(loss, case.leaves, given.device)
            if step:  # the first is for warming up
                times[name].append(elapsed * 1e3)
    found: dict[str, Any] = {f"{name}_ms": statistics.median(series) for name, series in times.items()}
    found |= {f"{name}_loss": value for name, value in values.items()}
    found["right_loss"] = case.right().item()
    found["equal"] = abs(found["ours_loss"] - found["right_loss"]) <= 1e-5 * abs(found["right_loss"])
    found["times_faster"] = found["transformers_ms"] / found["ours_ms"]
    if given.device == "cuda":
        found["ours_synchronizations"] = synchronizations(case.ours, case.leaves)
        found["transformers_synchronizations"] = synchronizations(case.theirs, case.leaves)
    return found


def criterion(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Prints the table and returns its figures."""
    results = {name: measure(name, given) for name in tqdm(given.families, desc="families", leave=False)}
    print("| family | transformers, ms | ours, ms | times faster | loss of transformers | ours | equal |")
    print("|---|---|---|---|---|---|---|")
    for name, row in results.items():
        equal = "yes" if row["equal"] else "NO"
        if row["right_loss"] != row["transformers_loss"]:
            equal += f", to {row['right_loss']:.3f}"
        print(
            f"| {name} | {row['transformers_ms']:.0f} | {row['ours_ms']:.0f} | {row['times_faster']:.1f} | "
            f"{row['transformers_loss']:.3f} | {row['ours_loss']:.3f} | {equal} |"
        )
    print("Equal to 1e-5; for D-FINE and DEIMv2 to transformers' loss with its layers aligned: see PAPERS.md.")
    if not all(row["equal"] for row in results.values()):
        raise SystemExit("The losses differ.")
    return results
