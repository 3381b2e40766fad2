from __future__ import annotations

import pytest
import torch

from hf_detrkd.structures.targets import BatchTotals, Targets
from tests import tiny


def test_targets_come_back_as_the_labels_they_were_made_from():
    labels = tiny.batch(boxes=(2, 0, 5, 1))["labels"]
    targets = Targets.from_labels(labels)
    assert targets.counts == (2, 0, 5, 1)
    for restored, label in zip(targets.to_labels(), labels, strict=True):
        assert restored.keys() == label.keys()
        assert all(torch.equal(restored[key], label[key]) and restored[key].dtype == label[key].dtype for key in label)


def test_targets_pad_to_the_fullest_image_with_class_zero_and_a_box_inside_the_image():
    labels = [{k: v + 1 if k == "class_labels" else v for k, v in label.items()} for label in _labels(2, 0, 3)]
    targets = Targets.from_labels(labels)
    assert targets.labels.shape == (3, 3) and targets.boxes.shape == (3, 3, 4)
    assert targets.valid.tolist() == [[True, True, False], [False, False, False], [True, True, True]]
    assert (targets.labels[~targets.valid] == 0).all() and (targets.labels[targets.valid] > 0).all()
    assert (targets.boxes[~targets.valid] == 0.5).all()


@pytest.mark.parametrize("counts", [(0,), (0, 0, 0)])
def test_a_batch_without_any_box_makes_empty_targets(counts):
    targets = Targets.from_labels(_labels(*counts))
    assert targets.labels.shape == (len(counts), 0) and targets.boxes.shape == (len(counts), 0, 4)
    assert targets.valid.shape == (len(counts), 0) and targets.counts == counts
    assert [len(label["boxes"]) for label in targets.to_labels()] == list(counts)


def test_targets_hold_boxes_in_float32_whatever_the_labels_hold():
    labels = [{key: value.double() if key == "boxes" else value for key, value in _labels(2)[0].items()}]
    assert Targets.from_labels(labels).boxes.dtype == torch.float32


def _labels(*counts: int) -> list[dict[str, torch.Tensor]]:
    return tiny.batch(boxes=counts)["labels"]


def test_totals_count_a_box_as_matched_only_where_there_is_a_query_for_it():
    totals = BatchTotals.of((3, 0, 9), num_queries=5)
    assert (totals.images, totals.boxes, totals.matched, totals.occupied, totals.share) == (3.0, 12.0, 8.0, 2.0, 1.0)


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize(("boxes", "share", "expected"), [(0.0, 1, 1.0), (0.0, 4, 0.25), (0.5, 4, 0.5), (3.0, 2, 3.0)])
def test_the_box_divisor_is_at_least_one_box_in_the_whole_batch(kind, boxes, share, expected):
    assert float(BatchTotals(*map(kind, (2.0, boxes, boxes, boxes, share))).boxes_or_one) == expected


def test_a_cross_entropy_divides_by_the_weights_of_all_queries():
    assert BatchTotals.of((3, 0, 9), num_queries=5).class_weight(5, 0.1) == pytest.approx(8 + 0.1 * 7)
