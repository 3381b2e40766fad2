"""Class losses between two detectors: torch.distributions, or a loop written from the formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_detrkd.losses.functional import class_targets, soft_class_loss, softmax_kl
from hf_detrkd.structures.outputs import Predictions


HEADS = ("sigmoid", "softmax")


def predictions(logits: Tensor, activation: str) -> Predictions:
    return Predictions(logits, torch.zeros(*logits.shape[:-1], 4), activation=activation)


def logits_for(activation: str, batch: int = 2, queries: int = 6, classes: int = 5, scale: float = 3.0) -> Tensor:
    return torch.randn(batch, queries, classes + (activation == "softmax")) * scale


@pytest.mark.parametrize("student", HEADS)
@pytest.mark.parametrize("teacher", HEADS)
@pytest.mark.parametrize("scale", [1.0, 10.0, 50.0])
def test_class_targets_are_probabilities_in_the_form_of_the_students_head(student, teacher, scale):
    logits = logits_for(teacher, scale=scale)
    targets = class_targets(predictions(logits, teacher), student)
    assert targets.shape == (2, 6, 5 + (student == "softmax"))
    assert targets.min() >= 0 and targets.max() <= 1
    if student == "softmax":
        torch.testing.assert_close(targets.sum(-1), torch.ones(2, 6))
    torch.testing.assert_close(targets, naive_targets(logits, teacher, student), atol=1e-6, rtol=1e-5)


def naive_targets(logits: Tensor, teacher: str, student: str) -> Tensor:
    rows = []
    for row in logits.flatten(0, -2).double().tolist():
        if teacher == "softmax":
            exponents = [math.exp(value - max(row)) for value in row]
            scores = [value / sum(exponents) for value in exponents]
            scores = scores if student == "softmax" else scores[:-1]
        else:
            scores = [1 / (1 + math.exp(-value)) for value in row]
            if student == "softmax":
                scores = [*scores, 1 - max(scores)]
                scores = [value / sum(scores) for value in scores]
        rows.append(scores)
    return torch.tensor(rows).view(*logits.shape[:-1], -1)


@pytest.mark.parametrize("classes", [1, 5, 80])
@pytest.mark.parametrize("queries", [1, 7])
def test_soft_class_loss_of_a_sigmoid_head_is_the_divergence_of_bernoullis(classes, queries):
    logits, target = torch.randn(2, queries, classes) * 3, torch.rand(2, queries, classes)
    bernoulli = torch.distributions.Bernoulli
    expected = torch.distributions.kl_divergence(
        bernoulli(probs=target.double()), bernoulli(logits=logits.double())
    ).sum(-1)
    torch.testing.assert_close(soft_class_loss(logits, target, "sigmoid").double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("classes", [1, 5, 80])
@pytest.mark.parametrize("queries", [1, 7])
def test_soft_class_loss_of_a_softmax_head_is_the_divergence_of_categoricals(classes, queries):
    logits, target = torch.randn(2, queries, classes + 1) * 3, torch.randn(2, queries, classes + 1).softmax(-1)
    categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(
        categorical(probs=target.double()), categorical(logits=logits.double())
    )
    torch.testing.assert_close(soft_class_loss(logits, target, "softmax").double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", HEADS)
def test_soft_class_loss_has_the_gradient_of_the_cross_entropy(activation):
    logits, target = (
        logits_for(activation).requires_grad_(),
        torch.randn(2, 6, 5 + (activation == "softmax")).softmax(-1),
    )
    (found,) = torch.autograd.grad(soft_class_loss(logits, target, activation).sum(), logits)
    probabilities = logits.sigmoid() if activation == "sigmoid" else logits.softmax(-1)
    torch.testing.assert_close(found, probabilities - target, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("activation", HEADS)
@pytest.mark.parametrize("classes", [5, 80])
@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (-5.0, 2.0), (0.0, 10.0), (0.0, 50.0)])
def test_equal_heads_have_no_loss_and_no_gradient(activation, classes, mean, scale):
    logits = (logits_for(activation, queries=200, classes=classes, scale=scale) + mean).requires_grad_()
    same = predictions(logits.detach(), activation)
    losses = [soft_class_loss(logits, class_targets(same, activation), activation)]
    losses += [softmax_kl(logits, logits.detach(), temperature) for temperature in (1.0, 10.0)]
    for loss in losses:
        assert loss.shape == (2, 200) and loss.abs().max() < 1e-6
        assert torch.autograd.grad(loss.sum(), logits)[0].abs().max() < 1e-6


@pytest.mark.parametrize("activation", HEADS)
@pytest.mark.parametrize("teacher", HEADS)
def test_opposite_extreme_logits_give_finite_losses_and_gradients(activation, teacher):
    logits = torch.full((1, 4, 5 + (activation == "softmax")), -50.0)
    logits[..., 0] = 50.0
    logits.requires_grad_()
    other = torch.full((1, 4, 5 + (teacher == "softmax")), -50.0)
    other[..., 1] = 50.0
    loss = soft_class_loss(logits, class_targets(predictions(other, teacher), activation), activation)
    torch.testing.assert_close(loss, torch.full((1, 4), 100.0))
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
@pytest.mark.parametrize("classes", [2, 5, 80])
def test_softmax_kl_is_the_divergence_of_the_student_from_the_teacher(temperature, classes):
    student, teacher = torch.randn(2, 3, 7, classes) * 3
    categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(
        categorical(logits=teacher / temperature), categorical(logits=student / temperature)
    )
    torch.testing.assert_close(softmax_kl(student, teacher, temperature), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_of_softmax_kl_proves_its_argument_order(temperature):
    student, teacher = torch.randn(5, 8).requires_grad_(), torch.randn(5, 8)
    (found,) = torch.autograd.grad(softmax_kl(student, teacher, temperature).sum(), student)
    expected = (F.softmax(student / temperature, -1) - F.softmax(teacher / temperature, -1)) / temperature
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_softmax_kl_draws_the_student_over_all_modes_of_the_teacher():
    teacher = torch.tensor([5.0, 5.0, -5.0])
    one_mode, both_and_more = torch.tensor([5.0, -5.0, -5.0]), torch.zeros(3)
    assert softmax_kl(one_mode, teacher, 1.0) > 4 * softmax_kl(both_and_more, teacher, 1.0)
    assert softmax_kl(teacher, one_mode, 1.0) < softmax_kl(teacher, both_and_more, 1.0)  # the other order: reversed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_float32(dtype):
    student, teacher = (logits_for("sigmoid").to(dtype) for _ in range(2))
    assert torch.equal(softmax_kl(student, teacher, 2.0), softmax_kl(student.float(), teacher.float(), 2.0))
    target = class_targets(predictions(teacher, "sigmoid"), "sigmoid")
    assert target.dtype == torch.float32
    assert torch.equal(
        soft_class_loss(student, target, "sigmoid"), soft_class_loss(student.float(), target, "sigmoid")
    )
