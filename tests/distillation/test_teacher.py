"""The frozen detector: what it must never do, whose class order it speaks, and what it sees and in which precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_detrkd.adapters import DetectorAdapter, adapter_for
from hf_detrkd.data.processor import NO_NORMALIZATION, normalization_of
from hf_detrkd.distillation.distiller import Distiller
from hf_detrkd.distillation.teacher import Teacher
from hf_detrkd.methods import KDDETR, DETRDistill, DETRDistillConfig, DistillationMethod, KDDETRConfig
from hf_detrkd.structures.outputs import DetectorOutput, ObjectQueries, Predictions
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import tiny


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5), (0.25, 0.5, 1.0)
TWO_STAGE = ("deformable_detr/two_stage", *tiny.DENOISING, *tiny.GROUPED)


def methods(student: DetectorAdapter, teacher: Teacher) -> list[DistillationMethod]:
    return [
        KDDETR(KDDETRConfig(general_points=10), student.spec, teacher.spec),
        DETRDistill(DETRDistillConfig(), student.spec, teacher.spec),
    ]


def losses_of(student: DetectorAdapter, teacher: Teacher) -> dict[str, Tensor]:
    """Of both methods."""
    inputs = tiny.batch(64)
    output, seen = student(inputs["pixel_values"])[0], teacher(inputs["pixel_values"])
    targets = Targets.from_labels(inputs["labels"])
    losses: dict[str, Tensor] = {}
    for method in methods(student, teacher):
        totals = BatchTotals.of(targets.counts, tiny.NUM_QUERIES)
        losses |= method(output, seen, targets, totals, torch.Generator().manual_seed(0))
    return losses


def foreign(family: str, grad: bool = False) -> ObjectQueries:
    """Queries that the family can be asked, not its own."""
    if family in ("detr", "table-transformer"):
        return ObjectQueries(position=torch.randn(2, 9, 32, requires_grad=grad))
    return ObjectQueries(boxes=tiny.random_boxes(2, 9).requires_grad_(grad))


def tensors(layers: tuple[Predictions, ...]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in (layer.logits, layer.boxes, layer.hidden_states)]


# --- frozen ----------------------------------------------------------------------------------------------------------


def test_a_teacher_is_in_eval_mode_and_makes_no_graph(build, askable):
    family = askable
    teacher = Teacher(build(family).train().requires_grad_(True), tiny.LABELS)
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    output = teacher(tiny.batch(64)["pixel_values"].requires_grad_())
    answers = [*tensors(output.layers), *tensors(output.decode(foreign(family, grad=True)))]
    answers += [level.values for maps in output.features.values() for level in maps]
    assert not any(tensor.requires_grad for tensor in answers)
    assert output.loss is None and output.layers[0].boxes.shape == (2, tiny.NUM_QUERIES, 4)


def test_nothing_that_walks_a_module_tree_finds_the_teacher(build):
    student, teacher = build("detr"), Teacher(build("detr", 64), tiny.LABELS)
    method = DETRDistill(DETRDistillConfig(assignment_weight=0.0), adapter_for(student).spec, teacher.spec)
    distiller = Distiller(student, teacher, [method]).train()
    hidden = {id(module) for module in teacher.model.modules()}
    assert not hidden & {id(module) for module in distiller.modules()}
    parts = ("student.", "methods.detrdistill.projections.")
    assert all(name.startswith(parts) for name, _ in (*distiller.named_parameters(), *distiller.named_buffers()))
    assert all(name.startswith(parts) for name in distiller.state_dict())
    assert not any(module.training for module in teacher.model.modules())


def test_a_teacher_is_bit_identical_after_training_and_the_student_is_not(build, askable):
    family = askable
    student = build(family).requires_grad_(True)
    teacher = Teacher(tiny.build(family, seed=1), tiny.LABELS)
    before = copy.deepcopy([*teacher.model.parameters(), *teacher.model.buffers()])
    started = copy.deepcopy(student.state_dict())
    for method in methods(adapter_for(student), teacher):
        distiller = Distiller(student, teacher, [method]).train()
        optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-4)
        for step in range(2):
            distiller(tiny.batch(64, seed=step), step=step)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    after = [*teacher.model.parameters(), *teacher.model.buffers()]
    assert all(torch.equal(now, was) for now, was in zip(after, before, strict=True))
    moved = [name for name, value in student.state_dict().items() if not torch.equal(value, started[name])]
    backbone = "conv_encoder" if family == "deimv2" else "backbone"
    assert {"encoder", "decoder", backbone} <= {part for name in moved for part in name.split(".")}


# --- classes ---------------------------------------------------------------------------------------------------------


def permuted(model: transformers.PreTrainedModel, order: list[int]) -> transformers.PreTrainedModel:
    """The same detector with its classes in another order: heads and names."""
    names = [model.config.id2label[i] for i in range(len(order))]
    model.config.id2label = {i: names[old] for i, old in enumerate(order)}
    done: set[int] = set()
    for name, module in model.named_modules():
        # The encoder's head of a two-stage Deformable DETR knows "object" alone, its column 0.
        if not isinstance(module, nn.Linear) or "class" not in name or name.endswith("class_embed.3"):
            continue
        if id(module.weight) not in done:  # layers without box refinement share theirs
            done.add(id(module.weight))
            rows = [*order, *range(len(order), module.out_features)]
            module.weight.data, module.bias.data = module.weight.data[rows], module.bias.data[rows]
    return model


def test_a_teacher_with_its_classes_in_another_order_teaches_the_same(build, askable):
    family = askable
    order = [3, 0, 4, 1, 2]
    plain, other = (Teacher(tiny.build(family, seed=1), tiny.LABELS) for _ in range(2))
    other = Teacher(permuted(other.model, order), tiny.LABELS)
    pixels, queries = tiny.batch(64)["pixel_values"], foreign(family)
    passes = [teacher(pixels) for teacher in (plain, other)]
    for mine, wanted in zip(passes[1].layers, passes[0].layers, strict=True):
        torch.testing.assert_close(mine.logits, wanted.logits)
    for mine, wanted in zip(passes[1].decode(queries), passes[0].decode(queries), strict=True):
        torch.testing.assert_close(mine.logits, wanted.logits)
    raw = adapter_for(other.model)(pixels)[0].layers[-1].logits
    assert (raw - passes[0].layers[-1].logits).abs().max() > 0.1
    student = adapter_for(build(family))
    expected, found = losses_of(student, plain), losses_of(student, other)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


# --- pixels ----------------------------------------------------------------------------------------------------------


def seen_by(teacher: Teacher, *args: Any) -> tuple[Tensor, DetectorOutput]:
    seen: list[Tensor] = []
    hook = teacher.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    output = teacher(*args)
    hook.remove()
    return seen[0], output


@pytest.mark.parametrize("theirs", [NO_NORMALIZATION, IMAGENET, HALVES], ids=["none", "imagenet", "halves"])
@pytest.mark.parametrize("ours", [NO_NORMALIZATION, IMAGENET], ids=["none", "imagenet"])
def test_a_teacher_sees_the_pixels_that_it_was_trained_on(build, ours, theirs):
    teacher = Teacher(build("detr"), tiny.LABELS, normalization=theirs, student_normalization=ours)
    raw, mask = torch.rand(2, 3, 64, 64), tiny.batch(64, padded=True)["pixel_mask"]

    def normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        channels = [(raw[:, c] - mean[c]) / std[c] for c in range(3)]
        return torch.stack(channels, 1) * mask[:, None]

    seen, output = seen_by(teacher, normalized(*ours), mask)
    torch.testing.assert_close(seen, normalized(*theirs), atol=1e-5, rtol=1e-5)
    assert not seen.movedim(1, -1)[mask == 0].any()
    expected = teacher.model(normalized(*theirs), pixel_mask=mask).logits
    torch.testing.assert_close(output.layers[-1].logits, expected, atol=1e-4, rtol=1e-4)


def test_images_without_a_mask_are_renormalized_whole(build):
    teacher = Teacher(build("rt_detr"), tiny.LABELS, normalization=IMAGENET)
    seen, _ = seen_by(teacher, torch.zeros(1, 3, 64, 64))
    expected = -torch.tensor(IMAGENET[0]) / torch.tensor(IMAGENET[1])
    torch.testing.assert_close(seen, expected[:, None, None].expand_as(seen))


def test_normalization_is_read_from_an_image_processor():
    off = SimpleNamespace(do_normalize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    on = SimpleNamespace(do_normalize=True, image_mean=list(IMAGENET[0]), image_std=list(IMAGENET[1]))
    assert normalization_of(off) == NO_NORMALIZATION and normalization_of(on) == IMAGENET


# --- precision -------------------------------------------------------------------------------------------------------

# Largest difference of logits (their spread is about 1) and of boxes from the same teacher in float32.
TOLERANCE = {torch.bfloat16: (0.3, 0.04), torch.float16: (0.04, 0.006)}


def assert_near(low: tuple[Predictions, ...], full: tuple[Predictions, ...], dtype: torch.dtype, slack: int) -> None:
    logits, boxes = (slack * tolerance for tolerance in TOLERANCE[dtype])
    for mine, wanted in zip(low, full, strict=True):
        assert mine.boxes.dtype == torch.float32 and mine.logits.isfinite().all() and mine.boxes.isfinite().all()
        torch.testing.assert_close(mine.logits.float(), wanted.logits, atol=logits, rtol=0)
        torch.testing.assert_close(mine.boxes, wanted.boxes, atol=boxes, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_teacher_in_16_bits_is_finite_and_near_the_one_in_32(build, askable, dtype):
    family, slack = askable, 40 if askable in tiny.UNBOUNDED else 1
    low, full = Teacher(build(family), tiny.LABELS, dtype), Teacher(build(family), tiny.LABELS)
    pixels = tiny.batch(64)["pixel_values"]
    answers, exact, queries = low(pixels), full(pixels), foreign(family)
    if family == "dino_detr":  # it would borrow contents of proposals, see below
        queries = replace(queries, content=torch.randn(2, 9, 32))
    assert_near(answers.decode(queries), exact.decode(queries), dtype, slack)
    # The proposals that a random encoder finds best are a matter of rounding.
    own = answers.layers if family not in TWO_STAGE else answers.decode(exact.queries)
    assert_near(own, exact.layers, dtype, slack)
    assert any(not torch.equal(a.logits.float(), b.logits) for a, b in zip(own, exact.layers, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_a_teacher_in_16_bits_keeps_its_matrices_in_them_and_answers_as_under_autocast(build, name, dtype):
    teacher, pixels = Teacher(build(name), tiny.LABELS, dtype), tiny.batch(64)["pixel_values"]

    def answers() -> list[Tensor]:
        found = teacher(pixels)
        decoded = found.decode(foreign(name)) if name != "yolos" else ()
        return [t for t in tensors((*found.layers, *decoded)) if t is not None]

    with torch.random.fork_rng():
        found = answers()
    cast = [p.dtype for m in teacher.model.modules() if type(m) in (nn.Linear, nn.Conv2d) for p in m.parameters(False)]
    assert cast.count(dtype) > len(cast) / 2 and torch.float32 in {p.dtype for p in teacher.model.parameters()}
    teacher.model.float().load_state_dict(build(name).state_dict())
    for mine, wanted in zip(found, answers(), strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_student_in_either_precision_learns_from_a_teacher_in_16_bits(build, askable, autocast):
    student = adapter_for(build(askable).requires_grad_(True))
    teacher = Teacher(tiny.build(askable, seed=1), tiny.LABELS, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = losses_of(student, teacher)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.model.parameters())


def test_a_float32_teacher_keeps_its_precision_inside_a_student_s_autocast(build, askable):
    teacher, pixels, queries = Teacher(build(askable), tiny.LABELS), tiny.batch(64)["pixel_values"], foreign(askable)
    expected = teacher(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        found = teacher(pixels)
        answers = found.decode(queries)
    assert torch.equal(found.layers[-1].logits, expected.layers[-1].logits)
    assert torch.equal(answers[-1].logits, expected.decode(queries)[-1].logits)


def test_a_teacher_that_was_loaded_in_16_bits_computes_in_the_precision_asked_for(build: Callable):
    teacher = Teacher(build("detr").to(torch.bfloat16), tiny.LABELS)
    assert teacher(tiny.batch(64)["pixel_values"]).layers[-1].logits.dtype == torch.float32
