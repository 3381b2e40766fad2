"""DINO's decoder and the choice of its queries, against the paper's words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.models.dino_detr import Build, asked, assert_same_gradients, gradients, run


def sine(boxes: Tensor, width: int) -> Tensor:
    """Embedding of `(y, x, width, height)`, each in half of `width` sines and cosines in turn."""
    waves = []
    for axis in (1, 0, 2, 3):
        for number in range(width // 2):
            angle = 2 * math.pi * boxes[..., axis] / 10000 ** (2 * (number // 2) / (width // 2))
            waves.append(angle.cos() if number % 2 else angle.sin())
    return torch.stack(waves, -1)


def perceptron(module: nn.Module, values: Tensor) -> Tensor:
    *hidden, last = module.layers
    for layer in hidden:
        values = (values @ layer.weight.T + layer.bias).clamp(min=0)
    return values @ last.weight.T + last.bias


def naive_decoder(decoder: nn.Module, arguments: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Logits and boxes of every layer, from the paper's words."""
    hidden, box = arguments["inputs_embeds"], arguments["reference_points"]
    ratios = arguments["valid_ratios"].repeat(1, 1, 2)  # image, level, (width, height, width, height)
    memory = {key: value for key, value in arguments.items() if key.startswith(("encoder_", "spatial_", "level_"))}
    found = []
    for number, layer in enumerate(decoder.layers):
        head = 0 if len(decoder.bbox_embed) == 1 else number
        seen = box.detach().clamp(1e-3, 1 - 1e-3).logit()
        on_levels = torch.stack([box.detach() * ratios[:, i, None] for i in range(ratios.shape[1])], 2)
        hidden = layer(
            hidden,
            object_queries_position_embeddings=perceptron(
                decoder.ref_point_head, sine(on_levels[:, :, 0], hidden.shape[-1])
            ),
            reference_points=on_levels,
            attention_mask=arguments["self_attention_mask"],
            **memory,
        )
        normal = decoder.norm(hidden)
        trained = box.clamp(1e-3, 1 - 1e-3).logit()
        logits = normal @ decoder.class_embed[head].weight.T + decoder.class_embed[head].bias
        found.append((logits, (perceptron(decoder.bbox_embed[head], normal) + trained).sigmoid()))
        box = (perceptron(decoder.bbox_embed[head], hidden) + seen).sigmoid()
    return found


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("training", [False, True])
def test_the_decoder_computes_what_the_paper_says(build: Build, shared: bool, training: bool) -> None:
    model = build("dino_detr", share_prediction_heads=shared).train(training).requires_grad_(True)
    with asked(model) as arguments:
        output = run(model, tiny.batch((96, 128), padded=True))
    layers = naive_decoder(model.model.decoder, arguments)
    logits, boxes = (torch.stack(values, 1) for values in zip(*layers, strict=True))
    torch.testing.assert_close(output.intermediate_logits, logits, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(output.intermediate_reference_points, boxes, atol=5e-5, rtol=1e-4)
    weights = torch.randn_like(boxes)
    found, expected = (
        gradients((values * weights).sum(), model) for values in (output.intermediate_reference_points, boxes)
    )
    assert_same_gradients(found, expected, 1e-3)


@pytest.mark.parametrize("layer", range(4))
def test_a_layer_s_boxes_train_its_own_head_and_that_of_the_layer_before(build: Build, layer: int) -> None:
    model = build("dino_detr", share_prediction_heads=False, decoder_layers=4).requires_grad_(True)
    output = run(model, tiny.batch())
    heads, proposing = model.model.decoder.bbox_embed, model.model.enc_bbox_embed

    def reached(values: Tensor) -> list[bool]:
        loss = (values * torch.randn_like(values)).sum()
        return [any(gradient.any() for gradient in gradients(loss, head)) for head in (*heads, proposing)]

    boxes, logits = output.intermediate_reference_points[:, layer], output.intermediate_logits[:, layer]
    assert reached(boxes) == [number in (layer - 1, layer) for number in range(4)] + [False]
    assert not any(reached(logits))
    assert reached(output.enc_topk_bboxes) == [False] * 4 + [True]


def naive_proposals(model: nn.Module, memory: Tensor, mask: Tensor, shapes: list[tuple[int, int]]) -> tuple:
    """Best class logit and box of every encoder token of one image."""
    base, rows, start = model.model, [], 0
    for level, (height, width) in enumerate(shapes):
        real = mask[start : start + height * width].view(height, width)
        for y in range(height):
            for x in range(width):
                size = 0.05 * 2**level
                centre = (x + 0.5) / int(real[0].sum()), (y + 0.5) / int(real[:, 0].sum())
                inside = all(0.01 < value < 0.99 for value in (*centre, size)) and bool(real[y, x])
                rows.append((*centre, size, size) if inside else (1.0,) * 4)
        start += height * width
    anchors = torch.tensor(rows)
    inside = (anchors < 1).all(-1, keepdim=True)
    tokens = base.enc_output_norm(base.enc_output(memory * inside))
    best = (tokens @ base.enc_class_embed.weight.T + base.enc_class_embed.bias).max(-1).values
    return best, (perceptron(base.enc_bbox_embed, tokens) + anchors.logit()).sigmoid()


@pytest.mark.parametrize("training", [False, True])
def test_queries_are_learned_contents_at_the_boxes_of_the_best_tokens_without_gradient(
    build: Build, training: bool
) -> None:
    model = build("dino_detr").train(training).requires_grad_(True)
    with asked(model) as arguments:
        output = run(model, tiny.batch(128, padded=True))
    own = slice(-tiny.NUM_QUERIES, None)
    content, reference = arguments["inputs_embeds"][:, own], arguments["reference_points"][:, own]
    assert not reference.requires_grad and output.enc_topk_bboxes.requires_grad
    assert torch.equal(content, model.model.query_content.weight.expand_as(content))
    for image, (memory, mask) in enumerate(
        zip(arguments["encoder_hidden_states"], arguments["encoder_attention_mask"], strict=True)
    ):
        best, boxes = naive_proposals(model, memory, mask, arguments["spatial_shapes_list"])
        rows = best.argsort(descending=True)[: tiny.NUM_QUERIES]
        torch.testing.assert_close(reference[image], boxes[rows].detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.enc_topk_bboxes[image], boxes[rows], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.enc_topk_logits[image].amax(-1), best[rows], atol=1e-4, rtol=1e-5)
