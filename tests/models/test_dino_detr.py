"""DINO: what the contract suite, which knows its family only, does not ask."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import transformers
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from hf_detrkd.adapters import adapter_for
from hf_detrkd.models import DinoDetrConfig, DinoDetrForObjectDetection
from hf_detrkd.outputs import Targets
from tests import tiny
from tests.models.apart import answers_apart


Build = Callable[..., DinoDetrForObjectDetection]
DECODED = ("intermediate_logits", "intermediate_reference_points", "intermediate_hidden_states")
"""What the decoder says, layers in the second dimension and rows in the third."""


def run(model: nn.Module, inputs: dict[str, Any], labels: bool = True) -> Any:
    torch.manual_seed(0)  # denoising draws random numbers
    return model(**{key: value for key, value in inputs.items() if labels or key != "labels"})


@contextmanager
def asked(model: nn.Module, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda _: {}) -> Iterator[dict]:
    """Keyword arguments of the decoder's call, after `change` replaced some of them."""
    seen: dict[str, Any] = {}

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        seen.update(kwargs | change(kwargs))
        return args, dict(seen)

    handle = model.model.decoder.register_forward_pre_hook(hook, with_kwargs=True)
    yield seen
    handle.remove()


def gradients(loss: Tensor, of: nn.Module | Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the parameters of a module, or of tensors; zero where there is none."""
    tensors = list(of.parameters()) if isinstance(of, nn.Module) else list(of)
    found = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def assert_same_gradients(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Each differs by no more than `tolerance` of its own norm, or of a tenth of all together."""
    whole = torch.cat([gradient.flatten() for gradient in expected]).norm()
    assert whole > 0
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * max(other.norm(), 0.1 * whole)


# --- denoising -------------------------------------------------------------------------------------------------------


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


# --- the loss --------------------------------------------------------------------------------------------------------


def naive_loss(output: Any, labels: list[dict[str, Tensor]], config: DinoDetrConfig) -> Tensor:
    """The paper's loss, one image and box at a time, in double precision."""
    count, most = max(sum(len(label["boxes"]) for label in labels), 1), max(len(label["boxes"]) for label in labels)
    start = output.intermediate_logits.shape[2] - config.num_queries
    groups = start // (2 * most) if start else 0
    total = torch.zeros((), dtype=torch.double)
    for image, label in enumerate(labels):
        classes, wanted = label["class_labels"].tolist(), label["boxes"].double()
        total += (
            set_loss(output.enc_topk_logits[image], output.enc_topk_bboxes[image], classes, wanted, config) / count
        )
        copies = [(2 * most * group + i, i) for group in range(groups) for i in range(len(classes))]
        for logits, boxes in zip(
            output.intermediate_logits[image], output.intermediate_reference_points[image], strict=True
        ):
            total += set_loss(logits[start:], boxes[start:], classes, wanted, config) / count
            if groups:
                noised = set_loss(logits[:start], boxes[:start], classes, wanted, config, copies)
                total += noised / (count * groups)
    return total


def set_loss(
    logits: Tensor,
    boxes: Tensor,
    classes: list[int],
    wanted: Tensor,
    config: DinoDetrConfig,
    pairs: list[tuple[int, int]] | None = None,
) -> Tensor:
    """Weighted focal loss of all rows, L1 and GIoU of the (row, box) pairs; by default those of least cost."""
    chances, boxes = logits.double().sigmoid(), boxes.double()
    corners, goals = (torchvision.ops.box_convert(values, "cxcywh", "xyxy") for values in (boxes, wanted))
    if pairs is None:
        hit = 0.25 * (1 - chances) ** 2 * -(chances + 1e-8).log()
        miss = 0.75 * chances**2 * -(1 - chances + 1e-8).log()
        cost = config.class_cost * (hit - miss)[:, classes] + config.bbox_cost * torch.cdist(boxes, wanted, p=1)
        cost = cost - config.giou_cost * torchvision.ops.generalized_box_iou(corners, goals)
        pairs = list(zip(*linear_sum_assignment(cost.detach().numpy()), strict=True))
    positive = torch.zeros_like(chances, dtype=torch.bool)
    for row, i in pairs:
        positive[row, classes[i]] = True
    alpha = config.focal_alpha
    focal = torch.where(
        positive, -alpha * (1 - chances) ** 2 * chances.log(), -(1 - alpha) * chances**2 * (1 - chances).log()
    )
    total = config.class_loss_coefficient * focal.sum()
    for row, i in pairs:
        giou = torchvision.ops.generalized_box_iou(corners[row : row + 1], goals[i : i + 1])
        total = total + config.bbox_loss_coefficient * (boxes[row] - wanted[i]).abs().sum()
        total = total + config.giou_loss_coefficient * (1 - giou.sum())
    return total


OTHER_WEIGHTS = {
    "class_cost": 1,
    "bbox_cost": 3,
    "giou_cost": 4,
    "class_loss_coefficient": 3,
    "bbox_loss_coefficient": 2,
    "giou_loss_coefficient": 7,
    "focal_alpha": 0.4,
}
LOSSES = pytest.mark.parametrize(
    ("boxes", "training", "weights"),
    [((2, 1), True, {}), ((3, 0), True, OTHER_WEIGHTS), ((9, 1), True, {}), ((0, 0), True, {}), ((2, 1), False, {})],
)


@LOSSES
def test_the_loss_is_that_of_the_formulas_and_so_is_its_gradient(build: Build, boxes, training, weights) -> None:
    model = build("dino_detr", **weights).train(training).requires_grad_(True)
    inputs = tiny.batch(128, boxes=boxes)
    output = run(model, inputs)
    expected = naive_loss(output, inputs["labels"], model.config)
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=0)
    read = [output[name] for name in (*DECODED[:2], "enc_topk_logits", "enc_topk_bboxes")]
    assert_same_gradients(gradients(output.loss, read), gradients(expected, read), 1e-5)
    assert all(gradient.any() for gradient in gradients(output.loss, model.model.input_proj))


@LOSSES
def test_the_loss_is_that_of_the_criterion_of_distillation(build: Build, boxes, training, weights) -> None:
    model = build("dino_detr", **weights).train(training).requires_grad_(True)
    inputs = tiny.batch(128, boxes=boxes)
    output = run(model, inputs)
    torch.manual_seed(0)
    ours = adapter_for(model)(inputs["pixel_values"], targets=Targets.from_labels(inputs["labels"]))[0]
    torch.testing.assert_close(output.loss, ours.loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(output.loss, model), gradients(ours.loss, model), 1e-3)
    torch.testing.assert_close(output.loss, sum(output.loss_dict.values()))


# --- the decoder -----------------------------------------------------------------------------------------------------


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
    torch.testing.assert_close(output.intermediate_reference_points, boxes, atol=2e-5, rtol=1e-4)
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


# --- query selection -------------------------------------------------------------------------------------------------


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


# --- config and initialisation ---------------------------------------------------------------------------------------


def test_defaults_are_the_paper_s() -> None:
    config = DinoDetrConfig()
    expected = {
        "num_queries": 900,
        "num_denoising": 100,
        "label_noise_ratio": 0.5,
        "box_noise_scale": 1.0,
        "num_feature_levels": 4,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_ffn_dim": 2048,
        "decoder_ffn_dim": 2048,
        "d_model": 256,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "encoder_n_points": 4,
        "decoder_n_points": 4,
        "dropout": 0.0,
        "activation_function": "relu",
        "position_temperature": 20,
        "share_prediction_heads": True,
        "class_cost": 2,
        "bbox_cost": 5,
        "giou_cost": 2,
        "class_loss_coefficient": 1,
        "bbox_loss_coefficient": 5,
        "giou_loss_coefficient": 2,
        "focal_alpha": 0.25,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.backbone_config.backbone, config.backbone_config.out_indices) == ("resnet50", [2, 3, 4])
    assert DinoDetrConfig(num_feature_levels=5).backbone_config.out_indices == [1, 2, 3, 4]
    assert DinoDetrConfig(backbone="resnet101").backbone_config.backbone == "resnet101"


@pytest.mark.parametrize("shared", [True, False])
def test_a_new_model_finds_every_class_with_one_in_a_hundred_and_moves_no_box(shared: bool) -> None:
    config = tiny.config("dino_detr", share_prediction_heads=shared)
    model = transformers.AutoModelForObjectDetection.from_config(config).eval()
    decoder = model.model.decoder
    assert len(decoder.class_embed) == len(decoder.bbox_embed) == (1 if shared else tiny.NUM_LAYERS)
    for head in (*decoder.class_embed, model.model.enc_class_embed):
        torch.testing.assert_close(head.bias.sigmoid(), torch.full((tiny.NUM_CLASSES,), 0.01))
    for head in (*decoder.bbox_embed, model.model.enc_bbox_embed):
        assert not head.layers[-1].weight.any() and not head.layers[-1].bias.any()
    output = run(model, tiny.batch(128), labels=False)
    boxes = output.init_reference_points.clamp(1e-3, 1 - 1e-3)[:, None].expand(-1, tiny.NUM_LAYERS, -1, -1)
    torch.testing.assert_close(output.intermediate_reference_points, boxes)


def test_every_deformable_attention_of_a_new_model_looks_into_all_directions() -> None:
    model = transformers.AutoModelForObjectDetection.from_config(tiny.config("dino_detr")).model
    ring = model.encoder.layers[0].self_attn.sampling_offsets.bias
    assert ring.view(4, -1, 2).mean((0, 1)).abs().max() < 1e-5 and ring.abs().max() == 4
    attentions = [layer.self_attn for layer in model.encoder.layers]
    for attention in attentions + [layer.encoder_attn for layer in model.decoder.layers]:
        assert not attention.sampling_offsets.weight.any() and not attention.attention_weights.weight.any()
        torch.testing.assert_close(attention.sampling_offsets.bias, ring)


@pytest.mark.parametrize("levels", [5, 6])
def test_levels_come_from_the_backbone_s_stages_then_from_its_last_then_from_each_other(levels: int) -> None:
    backbone = tiny.config("detr").backbone_config
    assert len(backbone.out_features) == 4
    model = tiny.build("dino_detr", num_feature_levels=levels, backbone_config=backbone).train()
    projected: list[tuple[Tensor, Tensor]] = []
    for projection in model.model.input_proj:
        projection.register_forward_hook(lambda _, args, output: projected.append((args[0], output)))
    inputs = tiny.batch(128, padded=True)
    with asked(model) as arguments:
        output = run(model, inputs)
    stages = [values for values, _ in model.model.backbone(inputs["pixel_values"], inputs["pixel_mask"])]
    read, made = zip(*projected, strict=True)
    for found, expected in zip(read, [*stages, stages[-1], *made[4:-1]], strict=True):
        torch.testing.assert_close(found, expected)
    assert arguments["spatial_shapes_list"] == [(side, side) for side in (32, 16, 8, 4, 2, 1)[:levels]]
    assert output.loss.isfinite()


def test_an_image_with_fewer_cells_than_queries_is_refused(build: Build) -> None:
    model = build("dino_detr", num_queries=86)
    run(model, tiny.batch(72), labels=False)  # 9 x 9 + 5 x 5 + ...
    with pytest.raises(ValueError, match="86 queries cannot be chosen among the 85 cells of these images: use larger"):
        run(model, tiny.batch(64))


# --- saving, checkpointing, precision --------------------------------------------------------------------------------


def test_a_saved_model_loads_here_and_where_this_package_is_not_installed(build: Build, tmp_path: Path) -> None:
    model, inputs = build("dino_detr"), tiny.batch(128, padded=True)
    inputs.pop("labels")
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = model(**inputs)
        again = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "saved")
        assert type(again) is DinoDetrForObjectDetection
        assert torch.equal(again(**inputs).logits, expected.logits)
    logits, boxes = answers_apart(tmp_path, inputs)
    assert torch.equal(logits, expected.logits) and torch.equal(boxes, expected.pred_boxes)


def test_the_pipeline_finds_objects(build: Build, tmp_path: Path) -> None:
    build("dino_detr").save_pretrained(tmp_path)
    transformers.DeformableDetrImageProcessor(size={"height": 128, "width": 128}).save_pretrained(tmp_path)
    pipeline = transformers.pipeline("object-detection", str(tmp_path))
    found = pipeline(Image.new("RGB", (90, 60), "red"), threshold=0.0)
    assert len(found) == tiny.NUM_QUERIES * tiny.NUM_CLASSES
    assert {entry["label"] for entry in found} == set(tiny.LABELS)


def test_activation_checkpointing_computes_layers_again_and_changes_no_gradient(build: Build) -> None:
    def outcome(checkpointed: bool) -> tuple[list[Tensor], int]:
        model, calls = build("dino_detr").train().requires_grad_(True), []
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
            layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
        return gradients(run(model, tiny.batch(128)).loss, model), len(calls)

    (plain, calls), (found, calls_again) = outcome(False), outcome(True)
    assert calls_again == 2 * calls > 0
    assert_same_gradients(found, plain, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_sixteen_bits_stay_finite(build: Build, dtype: torch.dtype, training: bool) -> None:
    model = build("dino_detr").train(training).requires_grad_(True)
    inputs = tiny.batch(128, padded=True)
    with torch.autocast("cpu", dtype):
        output = run(model, inputs)
    assert output.logits.dtype == dtype and output.pred_boxes.dtype == output.loss.dtype == torch.float32
    assert all(output[name].isfinite().all() for name in (*DECODED, "loss", "enc_topk_bboxes"))
    assert all(gradient.isfinite().all() for gradient in gradients(output.loss, model))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_a_model_whose_weights_have_sixteen_bits_answers(build: Build, dtype: torch.dtype, training: bool) -> None:
    model = build("dino_detr").to(dtype).train(training)
    inputs = tiny.batch(128, padded=True)
    output = run(model, inputs | {"pixel_values": inputs["pixel_values"].to(dtype)})
    assert all(output[name].isfinite().all() for name in (*DECODED, "loss", "enc_topk_bboxes"))
