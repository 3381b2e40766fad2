"""The control of KD-DETR: random queries that the ground truth supervises, without a teacher."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from hf_detrkd.adapters import adapter_for, spec_for
from hf_detrkd.distillation.distiller import Distiller
from hf_detrkd.methods import KDDETR, ExtraQueries, ExtraQueriesConfig, KDDETRConfig
from hf_detrkd.structures.outputs import DetectorOutput
from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import tiny
from tests.methods import naive
from tests.methods.fakes import HEADS, Fake, by_image, spec, targets_of, truth_of


# extra queries, own queries, layers, classes, boxes of each image
SIZES = {
    "some": (8, 6, 2, 3, (2, 1)),
    "one of everything": (1, 1, 1, 1, (1,)),
    "an image without boxes": (5, 6, 3, 4, (0, 3, 1)),
    "no boxes at all": (4, 6, 1, 3, (0, 0)),
    "as many boxes as queries": (4, 4, 2, 3, (4, 4)),
    "more boxes than queries": (3, 3, 2, 2, (5, 1)),
}


def compare(method: ExtraQueries, student: DetectorOutput, targets: Targets, seed: int = 0) -> dict[str, Tensor]:
    totals = BatchTotals.of(targets.counts, student.layers[0].boxes.shape[1])
    return method(student, None, targets, totals, torch.Generator().manual_seed(seed))


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("head", HEADS)
def test_the_loss_is_the_detection_loss_of_the_answers_matched_with_the_objects(sizes, head):
    extra, own, layers, classes, counts = sizes
    student = Fake(spec(own, layers, classes, head), len(counts), trains=True)
    targets = targets_of(*counts, num_classes=classes)
    method = ExtraQueries(ExtraQueriesConfig(extra_queries=extra), student.spec)
    losses = compare(method, student.output, targets)
    answers = by_image(student.answered[0])
    expected = naive.detrdistill_assignment(answers, answers, truth_of(targets), released=True)
    assert losses.keys() == {f"extra_queries_{part}_{layer}" for part, layer in expected}
    for (part, layer), value in expected.items():
        found = losses[f"extra_queries_{part}_{layer}"].double()
        torch.testing.assert_close(found, torch.as_tensor(value, dtype=torch.float64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("head", "class_weight"), [("sigmoid", 2.0), ("softmax", 1.0)])
def test_weights_are_those_of_detection(head, class_weight):
    weights = ExtraQueries(ExtraQueriesConfig(), spec(activation=head)).weights
    assert weights == {
        "extra_queries_class": class_weight,
        "extra_queries_box": 5.0,
        "extra_queries_giou": 2.0,
    }


def test_boxes_that_no_query_matched_teach_classes_alone():
    student, targets = Fake(spec(num_layers=1), 1, trains=True), targets_of(2)
    losses = compare(ExtraQueries(ExtraQueriesConfig(extra_queries=5), student.spec), student.output, targets)
    layer = student.answered[0][0]
    logits, boxes = torch.autograd.grad(sum(losses.values()), (layer.logits, layer.boxes))
    matched = [query for query, _ in naive.match_objects(by_image([layer])[0][0], *truth_of(targets)[0])]
    assert boxes[0].any(-1).nonzero().flatten().tolist() == sorted(matched) and logits[0].any(-1).all()


# --- places ----------------------------------------------------------------------------------------------------------


def asked(seed: int = 0, batch_size: int = 2, fields: str = "content boxes", **options: Any) -> Any:
    student = Fake(spec(fields=fields), batch_size)
    compare(
        ExtraQueries(ExtraQueriesConfig(**options), student.spec), student.output, targets_of(*[1] * batch_size), seed
    )
    return student.asked[0]


@pytest.mark.parametrize("distribution", ["normal_logit", "uniform"])
def test_places_follow_the_generator_and_are_the_same_for_all_images(distribution):
    options = {"extra_queries": 50, "general_distribution": distribution}
    boxes = asked(3, **options).boxes
    torch.manual_seed(1234)  # another process: its own global state, another number of images
    again = asked(3, batch_size=5, **options).boxes
    assert boxes.shape == (2, 50, 4) and torch.equal(boxes[0], again[0]) and (again == again[0]).all()
    assert not torch.equal(boxes, asked(4, **options).boxes)


def test_places_are_normal_before_the_sigmoid_or_uniform():
    boxes = asked(extra_queries=5000).boxes[0]
    for side in boxes.logit().T.numpy():
        assert scipy.stats.kstest(side, "norm").pvalue > 0.01
    boxes = asked(extra_queries=5000, general_distribution="uniform").boxes[0]
    assert boxes[:, 2:].min() == torch.tensor(0.01)
    for side in boxes.T.numpy():
        assert scipy.stats.kstest(side[side > 0.01], "uniform", (0.0, 1.0)).pvalue > 0.01


def test_places_are_those_of_the_general_points_of_kd_detr():
    student, teacher = Fake(spec()), Fake(spec())
    method = KDDETR(KDDETRConfig(general_points=40, specific_points=False), student.spec, teacher.spec)
    targets, totals = targets_of(1, 1), BatchTotals.of((1, 1), 6)
    method(student.output, teacher.output, targets, totals, torch.Generator().manual_seed(7))
    assert torch.equal(asked(7, extra_queries=40).boxes, student.asked[0].boxes)


def test_queries_start_from_zero_content_or_from_the_model_s_own():
    queries = asked(content="zero")
    assert queries.size == 600 and not queries.content.any() and queries.fields == {"content", "boxes"}
    assert asked().size == 600 and asked().fields == {"boxes"}


def test_a_decoder_of_embeddings_is_asked_embeddings_spread_like_its_own():
    queries = asked(fields="position", extra_queries=30)
    assert queries.fields == {"position"} and queries.position.shape == (2, 30, 8)
    assert (queries.position == queries.position[0]).all() and not queries.position.requires_grad


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_detector_that_cannot_be_asked_is_refused():
    message = "extra_queries needs a decoder that accepts external queries, but yolos has none: choose --method none."
    with pytest.raises(ValueError, match=message):
        ExtraQueries(ExtraQueriesConfig(), spec_for(tiny.config("yolos")))


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_queries_below_one_is_refused(count):
    with pytest.raises(ValueError, match=f"extra_queries must be at least 1, got {count}"):
        ExtraQueriesConfig(extra_queries=count)


# --- real detectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["zero", "own"])
def test_a_step_without_a_teacher_trains_every_family(build, askable, content):
    student = build(askable).requires_grad_(True)
    config = ExtraQueriesConfig(extra_queries=20, content=content)
    distiller = Distiller(student, None, [ExtraQueries(config, adapter_for(student).spec)]).train()
    output = distiller(tiny.batch(64, boxes=(2, 0)))
    assert {name for name in output["parts"] if name.startswith("extra")} == {
        f"extra_queries_{part}" for part in ("class", "box", "giou")
    }
    assert output["parts"]["distillation_loss"] > 0
    torch.testing.assert_close(
        output["loss"].detach(), output["parts"]["task_loss"] + output["parts"]["distillation_loss"]
    )
    output["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_every_part_reaches_the_backbone_and_no_query(build, askable):
    adapter = adapter_for(build(askable).requires_grad_(True))
    inputs = tiny.batch(64, boxes=(2, 1))
    output = adapter(inputs["pixel_values"])[0]
    method = ExtraQueries(ExtraQueriesConfig(extra_queries=20), adapter.spec)
    losses = compare(method, output, Targets.from_labels(inputs["labels"]))
    first = next(p for n, p in adapter.backbone_parameters() if n.endswith("weight") and p.ndim == 4)
    for part in ("class", "box", "giou"):
        terms = torch.stack([value for name, value in losses.items() if f"_{part}_" in name])
        assert len(terms) == tiny.NUM_LAYERS
        assert torch.autograd.grad(terms.sum(), first, retain_graph=True)[0].any(), part
    queries = method.query_requests(output, None, Targets.from_labels(inputs["labels"]), torch.Generator()).student[
        "extra"
    ]
    assert not any(getattr(queries, name).requires_grad for name in queries.fields)


@pytest.mark.parametrize("counts", [(0, 0), (0,)], ids=str)
def test_a_batch_without_boxes_teaches_classes_alone_with_finite_gradients(build, askable, counts):
    adapter = adapter_for(build(askable).requires_grad_(True))
    inputs = tiny.batch(128, boxes=counts)
    method = ExtraQueries(ExtraQueriesConfig(extra_queries=20), adapter.spec)
    losses = compare(method, adapter(inputs["pixel_values"])[0], Targets.from_labels(inputs["labels"]))
    for name, value in losses.items():
        assert value.requires_grad and (value > 0 if "class" in name else value == 0), name
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in adapter.model.parameters())
