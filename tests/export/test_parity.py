"""The comparison of a detector's answers with those of its exported file."""

from __future__ import annotations

import pytest
import torch

from hf_detrkd.export.parity import FLOAT16, FLOAT32, Deviation, OnnxParityError, Parity, compare, in_batches
from hf_detrkd.structures.outputs import Predictions
from tests import tiny


def answers(rows=7, images=2, activation="sigmoid"):
    columns = 6 if activation == "softmax" else 5
    return Predictions(torch.randn(images, rows, columns), tiny.random_boxes(images, rows), activation=activation)


def moved(predictions, logits=0.0, boxes=0.0, order=None):
    order = torch.arange(predictions.boxes.shape[1]) if order is None else order
    return Predictions(
        predictions.logits[:, order] + logits, predictions.boxes[:, order] + boxes, activation=predictions.activation
    )


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_rows_in_another_order_are_the_same_detections(activation):
    ours = answers(activation=activation)
    for deviation in compare(ours, moved(ours, order=torch.randperm(7)), ["a", "b"], FLOAT32):
        assert deviation.excess(FLOAT32) < 0.01 and not deviation.rows_agree and deviation.unpaired == 0
        assert deviation.compared == (7 if activation == "softmax" else 35) and deviation.beyond == 0


def test_a_shift_is_measured_with_rows_in_any_order():
    ours = answers()
    shift = torch.tensor([5e-4, 0, 0, 0])
    same = compare(ours, moved(ours, boxes=shift), ["a", "b"], FLOAT32)
    assert all(x.rows_agree and x.boxes == pytest.approx(5e-4, rel=1e-2) for x in same)
    swapped = compare(ours, moved(ours, boxes=shift, order=torch.arange(7).flip(0)), ["a", "b"], FLOAT32)
    assert all(not x.rows_agree and x.boxes == pytest.approx(5e-4, rel=1e-2) for x in swapped)
    far = compare(ours, moved(ours, boxes=4 * shift), ["a", "b"], FLOAT32)
    assert all(x.excess(FLOAT32) == pytest.approx(2, rel=1e-2) for x in far)


def test_only_the_image_that_deviates_is_blamed():
    ours = answers()
    theirs = moved(ours)
    theirs.boxes[1, 3, 0] += 0.1
    parity = Parity(compare(ours, theirs, ["good", "bad"], FLOAT32), FLOAT32)
    assert parity.deviations[0].rows_agree and parity.worst.image == "bad"
    with pytest.raises(OnnxParityError, match=r"bad in a batch of 2 differs by 0 and 0\.1"):
        parity.raise_if_beyond()


def test_a_detection_of_another_class_has_no_counterpart():
    ours = Predictions(torch.tensor([[[9.0, -9.0, -9.0]]]), tiny.random_boxes(1, 1), activation="softmax")
    theirs = Predictions(torch.tensor([[[-9.0, 9.0, -9.0]]]), ours.boxes, activation="softmax")
    (deviation,) = compare(ours, theirs, ["a"], FLOAT16)
    assert deviation.unpaired == 1 and deviation.excess(FLOAT16) == float("inf")
    with pytest.raises(OnnxParityError, match="1 detections without counterpart"):
        Parity([deviation], FLOAT16).raise_if_beyond()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["logits", "boxes"])
def test_what_is_no_number_is_infinitely_far(value, part):
    ours = answers()
    theirs = moved(ours)
    getattr(theirs, part)[0, 0] = value
    assert compare(ours, theirs, ["a", "b"], FLOAT16)[0].excess(FLOAT16) > 1


def test_weak_detections_do_not_count_in_sixteen_bits_and_sure_ones_do():
    logits = torch.tensor([[[4.0], [-4.0]]])
    ours = Predictions(logits, torch.full((1, 2, 4), 0.5), activation="sigmoid")
    weak, sure = moved(ours), moved(ours)
    weak.boxes[0, 1] += 0.2
    sure.boxes[0, 0] += 0.2
    assert compare(ours, weak, ["a"], FLOAT16)[0].excess(FLOAT16) == 0
    assert compare(ours, weak, ["a"], FLOAT32)[0].excess(FLOAT32) > 1
    assert compare(ours, sure, ["a"], FLOAT16)[0].excess(FLOAT16) > 1


def test_one_detection_in_a_hundred_may_differ_in_sixteen_bits_and_three_may_not():
    ours = Predictions(torch.full((1, 90, 1), 4.0), tiny.random_boxes(1, 90), activation="sigmoid")
    for rows, passes in ((1, True), (3, False)):
        theirs = moved(ours)
        theirs.boxes[0, :rows] += 0.4
        parity = Parity(compare(ours, theirs, ["a"], FLOAT16), FLOAT16)
        assert (parity.beyond, parity.compared) == (rows, 90)
        if passes:
            parity.raise_if_beyond()
            assert parity.as_dict()["beyond"] == 1
        else:
            with pytest.raises(OnnxParityError, match="3 of 90 detections differ more"):
                parity.raise_if_beyond()
    with pytest.raises(OnnxParityError):
        Parity(
            compare(ours, moved(ours, boxes=torch.tensor([2e-3, 0, 0, 0])), ["a"], FLOAT32), FLOAT32
        ).raise_if_beyond()


def test_a_check_of_nothing_is_none():
    ours = Predictions(torch.full((1, 2, 1), -4.0), torch.full((1, 2, 4), 0.5), activation="sigmoid")
    (deviation,) = compare(ours, moved(ours, boxes=0.2), ["a"], FLOAT16)
    assert deviation.compared == 0
    with pytest.raises(OnnxParityError, match=r"needs images with detections of a score of at least"):
        Parity([deviation], FLOAT16).raise_if_beyond()


def test_the_hundredth_detection_may_change_with_the_next_one_as_good():
    scores = torch.linspace(4, 1, 120)
    scores[99], scores[100] = 1.5, 1.5 - 1e-6
    scores[101:] = -4
    ours = Predictions(scores.view(1, 60, 2), tiny.random_boxes(1, 60), activation="sigmoid")
    theirs = moved(ours)
    theirs.logits[0, 49, 1] -= 2e-6
    theirs.boxes[0, 55] += 0.5  # so that rows do not agree
    (deviation,) = compare(ours, theirs, ["a"], FLOAT32)
    assert deviation.compared == 99 and deviation.excess(FLOAT32) < 1
    theirs.boxes[0, 25] += 0.5
    assert compare(ours, theirs, ["a"], FLOAT32)[0].excess(FLOAT32) > 1


def test_other_shapes_are_no_answer():
    with pytest.raises(OnnxParityError, match=r"must have the shapes .* but onnxruntime returns"):
        compare(answers(7), answers(6), ["a", "b"], FLOAT32)


def test_batches_are_always_full_and_hold_every_image():
    assert list(in_batches(["a", "b", "c", "d"], 3)) == [["a", "b", "c"], ["d", "a", "b"]]
    assert list(in_batches(["a"], 3)) == [["a", "a", "a"]]
    assert list(in_batches(["a", "b"], 1)) == [["a"], ["b"]]


def test_the_worst_deviation_is_measured_in_tolerances():
    small = Deviation("scores", 1, scores=9e-5, boxes=0.0, rows_agree=True, compared=1)
    large = Deviation("boxes", 1, scores=0.0, boxes=5e-4, rows_agree=True, compared=1)
    assert Parity([large, small], FLOAT32).worst is small
    Parity([large, small], FLOAT32).raise_if_beyond()
