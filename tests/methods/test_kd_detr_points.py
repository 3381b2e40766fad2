"""KD-DETR's points: where they lie, and whom they are asked of."""

from __future__ import annotations

import pytest
import scipy.stats
import torch

from hf_detrkd.methods import KDDETR, KDDETRConfig
from tests.methods.fakes import Fake, spec
from tests.methods.kd_detr import GROUPS, compare


def points(seed: int = 0, config: KDDETRConfig | None = None, batch_size: int = 2) -> tuple[Fake, Fake]:
    student, teacher = Fake(spec(width=16), batch_size), Fake(spec(), batch_size)
    method = KDDETR(config or KDDETRConfig(specific_points=False), student.spec, teacher.spec)
    compare(method, student.output, teacher.output, seed)
    return student, teacher


def test_both_models_are_asked_the_same_general_points_from_zero_content():
    student, teacher = points(config=KDDETRConfig(specific_points=False, content="zero"))
    assert torch.equal(student.asked[0].boxes, teacher.asked[0].boxes)
    assert student.asked[0].boxes.shape == (2, 300, 4)
    assert torch.equal(student.asked[0].content, torch.zeros(2, 300, 16))
    assert torch.equal(teacher.asked[0].content, torch.zeros(2, 300, 8))


def test_without_content_the_teacher_is_asked_its_own_boxes_again():
    student, teacher = points(config=KDDETRConfig(general_points=0, content="zero"))
    (asked,), (again,) = student.asked, teacher.asked
    assert torch.equal(asked.boxes, teacher.output.queries.boxes) and torch.equal(asked.boxes, again.boxes)
    assert not asked.content.any() and not again.content.any()


def test_the_teacher_s_content_goes_with_its_own_boxes_alone():
    student, teacher = Fake(spec()), Fake(spec())
    compare(KDDETR(KDDETRConfig(content="teacher"), student.spec, teacher.spec), student.output, teacher.output)
    specific, general = sorted(student.asked, key=lambda queries: -len(queries.fields))
    assert torch.equal(specific.content, teacher.output.queries.content)
    assert general.fields == {"boxes"} and len(teacher.asked) == 1


@pytest.mark.parametrize("width", [8, 16])
def test_own_content_is_left_to_each_model_even_where_the_teacher_s_would_fit(width):
    student, teacher = Fake(spec(width=width)), Fake(spec(width=8))
    compare(KDDETR(KDDETRConfig(content="own"), student.spec, teacher.spec), student.output, teacher.output)
    asked = [*student.asked, *teacher.asked]
    assert len(asked) == 3 and all(queries.fields == {"boxes"} for queries in asked)


@pytest.mark.parametrize("distribution", ["normal_logit", "uniform"])
def test_general_points_follow_the_generator_and_nothing_else(distribution):
    config = KDDETRConfig(specific_points=False, general_points=50, general_distribution=distribution)
    boxes = points(seed=3, config=config)[0].asked[0].boxes
    torch.manual_seed(1234)  # another process: its own global state, another number of images
    again = points(seed=3, config=config, batch_size=5)[0].asked[0].boxes
    assert torch.equal(boxes[0], again[0]) and not torch.equal(boxes, points(4, config)[0].asked[0].boxes)
    assert (again == again[0]).all()


def test_general_points_are_normal_before_the_sigmoid():
    config = KDDETRConfig(specific_points=False, general_points=5000)
    boxes = points(config=config)[0].asked[0].boxes[0]
    for side in boxes.logit().T.numpy():
        assert scipy.stats.kstest(side, "norm").pvalue > 0.01


def test_uniform_points_are_uniform_with_sides_of_at_least_a_hundredth():
    config = KDDETRConfig(specific_points=False, general_points=5000, general_distribution="uniform")
    boxes = points(config=config)[0].asked[0].boxes[0]
    assert boxes[:, 2:].min() == torch.tensor(0.01)
    for side in boxes.T.numpy():
        assert scipy.stats.kstest(side[side > 0.01], "uniform", (0.0, 1.0)).pvalue > 0.01


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        (KDDETRConfig(general_points=0), {"specific"}),
        (KDDETRConfig(specific_points=False), {"general"}),
        (KDDETRConfig(), set(GROUPS)),
    ],
)
def test_each_group_can_be_switched_off(config, groups):
    student, teacher = Fake(spec()), Fake(spec())
    losses = compare(KDDETR(config, student.spec, teacher.spec), student.output, teacher.output)
    assert {name.split("_")[3] for name in losses} == groups
    assert len(student.asked) == len(groups) and len(teacher.asked) == ("general" in groups)


def test_specific_points_are_the_teacher_s_boxes_without_its_content():
    student, teacher = Fake(spec()), Fake(spec())
    compare(KDDETR(KDDETRConfig(), student.spec, teacher.spec), student.output, teacher.output)
    assert torch.equal(student.asked[0].boxes, teacher.output.queries.boxes)
    assert student.asked[0].fields == {"boxes"}


def test_learned_queries_of_an_equal_model_are_shared_whole():
    fields = "content position points"
    student, teacher = Fake(spec(fields=fields)), Fake(spec(fields=fields))
    compare(KDDETR(KDDETRConfig(), student.spec, teacher.spec), student.output, teacher.output)
    asked = student.asked[0]
    assert asked.fields == {"content", "position", "points"}
    assert all(torch.equal(getattr(asked, name), getattr(teacher.output.queries, name)) for name in asked.fields)


def test_points_of_embeddings_spread_like_the_teacher_s_own():
    student, teacher = Fake(spec(fields="position")), Fake(spec(fields="position", num_queries=4000))
    own = teacher.output.queries.position
    own *= torch.linspace(0, 4, 8)
    own += torch.linspace(-3, 3, 8)
    own[1] = own[0]
    compare(KDDETR(KDDETRConfig(general_points=4000), student.spec, teacher.spec), student.output, teacher.output)
    drawn = teacher.asked[0].position
    assert torch.equal(drawn, student.asked[1].position) and torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn[0].mean(0), own[0].mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(drawn[0].std(0), own[0].std(0), atol=0.05, rtol=0)
