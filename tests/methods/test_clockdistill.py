"""CLoCKDistill's answers to the target queries, against naive loops, and its options."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_detrkd.adapters import spec_for
from hf_detrkd.methods import CLoCKDistill, CLoCKDistillConfig
from hf_detrkd.structures.targets import Targets
from tests import each, tiny
from tests.methods import naive
from tests.methods.backward import total
from tests.methods.clockdistill import ONLY_MEMORY, ONLY_QUERIES, PLACED, PLACELESS, compare, losses_of
from tests.methods.fakes import HEADS, Fake, by_image, spec, targets_of


PARTS = ("class", "box", "giou")
# layers of student and teacher, classes, boxes of each image
SIZES = {
    "equal": (2, 2, 3, (2, 1)),
    "6 layers teach 3": (3, 6, 2, (3,)),
    "2 layers teach 3": (3, 2, 5, (1, 4, 2)),
    "3 layers teach 2": (2, 3, 1, (2, 2)),
    "one of everything": (1, 1, 2, (1,)),
    "an image without boxes": (2, 2, 3, (0, 3, 1)),
    "no boxes at all": (2, 1, 3, (0, 0)),
}
grid = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def fakes(sizes: tuple, student_head: str = "sigmoid", teacher_head: str = "sigmoid") -> tuple[Fake, Fake, Targets]:
    student_layers, teacher_layers, classes, counts = sizes
    student = spec(5, student_layers, classes, student_head)
    teacher = spec(6, teacher_layers, classes, teacher_head)
    batch = len(counts)
    return Fake(student, batch, trains=True), Fake(teacher, batch), targets_of(*counts, num_classes=classes)


@grid
@each("student_head", HEADS)
@each("teacher_head", HEADS)
@each("class_loss", ["softmax_kl", "bce"])
def test_answers_equal_the_naive_computation(sizes, student_head, teacher_head, class_loss):
    for temperature in (10.0, 2.5):
        student, teacher, targets = fakes(sizes, student_head, teacher_head)
        options = {"class_loss": class_loss, "temperature": temperature}
        losses = losses_of(student, teacher, targets, **options, **ONLY_QUERIES)
        answers = by_image(student.answered[0]), by_image(teacher.answered[0])
        # A softmax over the one class of a sigmoid head is constant: there the class term is that of bce.
        tempered = class_loss == "softmax_kl" and (sizes[2] > 1 or student_head == "softmax")
        expected = naive.clockdistill_queries(*answers, list(targets.counts), tempered, temperature)
        assert losses.keys() == {f"clockdistill_{part}_{layer}" for part, layer in expected}
        for (part, layer), value in expected.items():
            found = losses[f"clockdistill_{part}_{layer}"].double()
            torch.testing.assert_close(found, torch.as_tensor(value), rtol=2e-4, atol=2e-6)
            assert (found > 0) == (sum(targets.counts) > 0)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0])
def test_the_class_term_has_the_gradient_of_the_teacher_first_divergence(head, temperature):
    """`T^2 KL(teacher || student)` has the gradient `T (p_student - p_teacher)`; the authors' prototype swaps the two,
    and the detached side has none."""
    student, teacher, targets = fakes((2, 2, 4, (3, 1)), head, head)
    losses = losses_of(student, teacher, targets, class_loss="softmax_kl", temperature=temperature, **ONLY_QUERIES)
    answered, wanted = student.answered[0][1], teacher.answered[0][1]
    (gradient,) = torch.autograd.grad(losses["clockdistill_class_1"], answered.logits)
    weight = wanted.scores().amax(-1) * targets.valid
    weight = weight / weight.sum(-1, keepdim=True) / 2
    apart = (answered.logits / temperature).softmax(-1) - (wanted.logits / temperature).softmax(-1)
    torch.testing.assert_close(gradient, weight[..., None] * temperature * apart, atol=1e-6, rtol=1e-4)
    assert (gradient[targets.valid].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("class_loss", ["softmax_kl", "bce"])
def test_answers_to_rows_of_padding_count_nowhere(class_loss):
    student, teacher, targets = fakes((2, 3, 4, (4, 1, 0)))
    answers = student.answer(4), teacher.answer(4)
    padding = ~targets.valid

    def losses() -> dict[str, Tensor]:
        outputs = [
            replace(fake.output, decode=lambda _, a=a: a) for fake, a in zip((student, teacher), answers, strict=True)
        ]
        config = CLoCKDistillConfig(class_loss=class_loss, **ONLY_QUERIES)
        return compare(CLoCKDistill(config, student.spec, teacher.spec), *outputs, targets)

    before = losses()
    for layer in answers[0]:
        for values in torch.autograd.grad(total(before), (layer.logits, layer.boxes), retain_graph=True):
            assert not values[padding].any() and values[targets.valid].any(-1).all()
    for side in answers:
        for layer in side:
            layer.logits.data[padding] = 50 * torch.randn(int(padding.sum()), 4)
            layer.boxes.data[padding] = tiny.random_boxes(int(padding.sum()))
    after = losses()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("class_loss", "least"), [("softmax_kl", 0.0), ("bce", 1e-6)])
def test_equal_answers_and_maps_have_no_loss(head, class_loss, least):
    for padded, gate in itertools.product((False, True), ("none", "better")):
        teacher, targets = Fake(spec(activation=head, num_layers=3), padded=padded), targets_of(4, 2)
        answers = teacher.answer(4)
        output = replace(teacher.output, decode=lambda _, answers=answers: answers)
        config = CLoCKDistillConfig(class_loss=class_loss, gate=gate)
        losses = compare(CLoCKDistill(config, teacher.spec, teacher.spec), output, output, targets)
        assert len(losses) == 3 * 3 + (2 if gate == "none" else 1)
        assert all(abs(value) <= least for value in losses.values()), losses


def test_both_models_are_asked_at_every_box_from_zero_content():
    student, teacher = Fake(spec(width=16), 3), Fake(spec(), 3)
    targets = targets_of(2, 0, 3)
    losses_of(student, teacher, targets, content="zero")
    for fake in (student, teacher):
        (asked,) = fake.asked
        assert asked.fields == {"boxes", "content", "groups"}
        assert torch.equal(asked.boxes, targets.boxes) and not asked.boxes.requires_grad
        assert torch.equal(asked.content, torch.zeros(3, 3, fake.spec.width))
        assert torch.equal(asked.groups == 0, targets.valid)


@pytest.mark.parametrize("width", [8, 16])
def test_own_content_is_left_to_each_model(width):
    student, teacher = Fake(spec(width=width)), Fake(spec())
    losses_of(student, teacher, targets_of(2, 1), content="own")
    assert all(queries.fields == {"boxes", "groups"} for queries in [*student.asked, *teacher.asked])


def test_content_for_the_class_is_the_same_in_both_models_and_in_every_run():
    targets = replace(targets_of(2, 0, 3), labels=torch.tensor([[0, 2, 0], [0, 0, 0], [2, 1, 2]]))
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        student, teacher = Fake(spec(), 3), Fake(spec(), 3)
        losses_of(student, teacher, targets, class_content=True)
        found += [*student.asked, *teacher.asked]
    content = found[0].content
    assert len(found) == 4 and all(torch.equal(queries.content, content) for queries in found)
    labels, contents = targets.labels[targets.valid].tolist(), content[targets.valid]
    pairs = list(itertools.combinations(range(len(labels)), 2))
    assert {labels[i] == labels[j] for i, j in pairs} == {True, False}
    assert all(torch.equal(contents[i], contents[j]) == (labels[i] == labels[j]) for i, j in pairs)
    assert 0.5 < content.std() < 1.5
    with pytest.raises(ValueError, match="the student is 16 and the teacher 8 wide"):
        losses_of(Fake(spec(width=16)), Fake(spec(width=8)), targets, class_content=True)


def test_layers_have_the_weights_of_the_config():
    torch.manual_seed(0)
    student, teacher, targets = Fake(spec(num_layers=2)), Fake(spec(num_layers=2)), targets_of(2, 1)
    answers = student.answer(2), teacher.answer(2)
    outputs = [replace(f.output, decode=lambda _, a=a: a) for f, a in zip((student, teacher), answers, strict=True)]
    found = []
    for weights in (None, [0.5, 3.0]):
        method = CLoCKDistill(CLoCKDistillConfig(layer_weights=weights, **ONLY_QUERIES), student.spec, teacher.spec)
        found.append(compare(method, *outputs, targets))
    plain, weighted = found
    for part in PARTS:
        for layer, factor in ((0, 0.5), (1, 3.0)):
            name = f"clockdistill_{part}_{layer}"
            torch.testing.assert_close(weighted[name], factor * plain[name])
    with pytest.raises(ValueError, match=r"must have 2 weights, one per layer, got \[1.0\]"):
        losses_of(student, teacher, targets, layer_weights=[1.0])


def test_a_batch_without_boxes_asks_one_row_of_padding():
    student, teacher, targets = fakes(SIZES["no boxes at all"])
    losses_of(student, teacher, targets)
    assert [queries.size for queries in [*student.asked, *teacher.asked]] == [1, 1]
    assert torch.equal(student.asked[0].groups, torch.ones(2, 1, dtype=torch.long))


@pytest.mark.parametrize("part", ["memory", "target_queries"])
def test_a_weight_of_zero_switches_a_loss_off_and_changes_no_other(part):
    student, teacher, targets = fakes((2, 3, 3, (2, 1)))
    found = []
    for options in ({}, {f"{part}_weight": 0.0}):
        torch.manual_seed(0)
        found.append(losses_of(student, teacher, targets, **options))
    everything, rest = found
    memory = {"clockdistill_foreground_0", "clockdistill_background_0"}
    assert memory < everything.keys()
    assert rest.keys() == (everything.keys() - memory if part == "memory" else memory)
    assert all(torch.equal(value, everything[name]) for name, value in rest.items())
    assert len(student.asked) == len(teacher.asked) == (2 if part == "memory" else 1)


def test_weights_are_the_config_s_times_those_of_the_formula():
    config = CLoCKDistillConfig(memory_weight=3, target_queries_weight=4, foreground_alpha=2, background_beta=0.5)
    found = [CLoCKDistill(c, spec(), spec()).weights for c in (CLoCKDistillConfig(), config)]
    names = [f"clockdistill_{part}" for part in ("foreground", "background", *PARTS)]
    assert found == [dict(zip(names, values, strict=True)) for values in ((1e-3, 3e-3, 1, 5, 2), (6, 1.5, 4, 20, 8))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"memory_weight": -1.0},
            r"CLoCKDistill's weights must be at least 0, and memory_weight or target_queries_weight above 0, got "
            r"\(-1.0, 1.0\), alpha 0.001 and beta 0.003\.",
        ),
        ({"target_queries_weight": -1.0}, r"got \(1.0, -1.0\), alpha"),
        ({"memory_weight": 0.0, "target_queries_weight": 0.0}, r"target_queries_weight above 0, got \(0.0, 0.0\)"),
        ({"foreground_alpha": -2.0}, "alpha -2.0 and beta 0.003"),
        ({"background_beta": -3.0}, "alpha 0.001 and beta -3.0"),
        ({"layer_weights": [1.0, -1.0]}, r"layer_weights must be at least 0, got \[1.0, -1.0\]"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CLoCKDistillConfig(**options)


@each("first", PLACELESS)
@each("second", tiny.FAMILIES)
def test_a_pair_without_a_shared_place_learns_the_memory_alone(first, second):
    for student, teacher in ((first, second), (second, first)):
        specs = spec_for(tiny.config(student)), spec_for(tiny.config(teacher))
        message = (
            f"CLoCKDistill decodes queries at the ground-truth boxes, but a {teacher} teacher and a {student} student "
            "share neither boxes nor reference points: set target_queries_weight to 0, or choose two families with "
            "boxes or reference points"
        )
        with pytest.raises(ValueError, match=message):
            CLoCKDistill(CLoCKDistillConfig(), *specs)
        CLoCKDistill(CLoCKDistillConfig(**ONLY_MEMORY), *specs)


@each("student", PLACED)
@each("teacher", PLACED)
def test_every_pair_of_families_with_places_is_accepted(student, teacher):
    CLoCKDistill(CLoCKDistillConfig(), spec_for(tiny.config(student)), spec_for(tiny.config(teacher, 64)))
