"""DINO's denoising rows: who sees them, how many there are, and how far they are from the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from tests import tiny
from tests.models.dino_detr import DECODED, Build, asked, run


def changed_rows(model: nn.Module, rows: Sequence[int]) -> tuple[set[int], int]:
    """Rows whose answer changes in every layer and image if the contents and boxes of some rows do, and the number of
    all; what any other row says must stay as it was."""

    def change(arguments: dict[str, Any]) -> dict[str, Any]:
        content, boxes = arguments["inputs_embeds"].clone(), arguments["reference_points"].clone()
        content[:, rows] += 1
        boxes[:, rows] = tiny.random_boxes(len(content), len(rows))
        return {"inputs_embeds": content, "reference_points": boxes}

    inputs = tiny.batch(128)
    before = run(model, inputs)
    with asked(model, change):
        after = run(model, inputs)
    moved = torch.stack([(after[name] - before[name]).abs().amax(-1) for name in DECODED]).amax(0).flatten(0, 1)
    everywhere, anywhere = (moved > 1e-4).all(0), (moved > 1e-6).any(0)
    assert torch.equal(everywhere, anywhere)
    return set(everywhere.nonzero().flatten().tolist()), moved.shape[-1]


@torch.no_grad()
@pytest.mark.parametrize("group", [0, 2, 4])
def test_a_denoising_group_sees_itself_and_the_queries_and_is_seen_by_nobody(build: Build, group: int) -> None:
    model = build("dino_detr").train()
    own_group, queries = (
        set(range(4 * group, 4 * group + 4)),
        set(range(20, 27)),
    )  # two boxes, noised twice, five times
    assert changed_rows(model, [4 * group]) == (own_group, 27)
    assert changed_rows(model, sorted(own_group)) == (own_group, 27)
    assert changed_rows(model, sorted(queries)) == (set(range(27)), 27)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("number", "boxes", "rows"),
    [(10, (2, 1), 20), (10, (3, 0), 18), (10, (12, 1), 24), (0, (2, 1), 0), (10, (0, 0), 0)],
)
def test_denoising_rows_fill_whole_groups_in_training_only(
    build: Build, number: int, boxes: tuple[int, int], rows: int, training: bool
) -> None:
    model = build("dino_detr", num_denoising=number).train(training)
    with asked(model) as arguments:
        output = run(model, tiny.batch(boxes=boxes))
    rows *= training
    assert arguments["inputs_embeds"].shape[1] == output.intermediate_logits.shape[2] == rows + tiny.NUM_QUERIES
    assert (output.denoising_meta_values is None) == (arguments["self_attention_mask"] is None) == (rows == 0)
    assert torch.equal(output.logits, output.intermediate_logits[:, -1, rows:])
    assert torch.equal(output.pred_boxes, output.intermediate_reference_points[:, -1, rows:])


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
def test_positive_corners_move_by_less_than_half_a_box_and_negative_ones_by_more(build: Build, scale: float) -> None:
    model = build("dino_detr", label_noise_ratio=0.0, box_noise_scale=scale).train()
    inputs, base = tiny.batch(), model.model
    for label in inputs["labels"]:  # so small and far inside that noise leaves none outside
        label["boxes"] = torch.cat([0.4 + 0.2 * label["boxes"][:, :2], 0.05 + label["boxes"][:, 2:] / 3], -1)
    with asked(model) as arguments:
        run(model, inputs)
    for image, label in enumerate(inputs["labels"]):
        classes, wanted, count = label["class_labels"], label["boxes"], len(label["boxes"])
        content, boxes = (
            arguments[name][image, :20].unflatten(0, (5, 2, 2))[:, :, :count]  # group, sign, box
            for name in ("inputs_embeds", "reference_points")
        )
        torch.testing.assert_close(content, base.denoising_class_content.weight[classes].expand_as(content))
        corners, goals = (torchvision.ops.box_convert(values, "cxcywh", "xyxy") for values in (boxes, wanted))
        moved = (corners - goals).abs() / wanted[:, 2:].repeat(1, 2) * 2
        assert moved[:, 0].max() < scale + 1e-3
        upright = moved[:, 1][(boxes[:, 1, :, 2:] > 1e-4).repeat(1, 1, 2)]  # noise that turns a box over empties it
        assert scale - 1e-3 < upright.min() and upright.max() < 2 * scale + 1e-3


def test_labels_change_no_answer_in_evaluation(build: Build) -> None:
    model, inputs = build("dino_detr"), tiny.batch(128, padded=True)
    with_labels, without = run(model, inputs), run(model, inputs, labels=False)
    assert with_labels.loss is not None and without.loss is None
    for name in (*DECODED, "logits", "pred_boxes", "enc_topk_logits", "init_reference_points"):
        assert torch.equal(with_labels[name], without[name]), name


def test_rows_of_padding_start_from_nothing_at_the_middle_as_in_the_original(build: Build) -> None:
    model = build("dino_detr").train()
    with asked(model) as arguments:
        run(model, tiny.batch(boxes=(2, 1)))
    content, boxes = arguments["inputs_embeds"][1, :20], arguments["reference_points"][1, :20]
    padding = torch.tensor([False, True]).repeat(10)
    assert not content[padding].any() and (boxes[padding] == 0.5).all()
    assert content[~padding].any(-1).all() and not (boxes[~padding] == 0.5).all(-1).any()
