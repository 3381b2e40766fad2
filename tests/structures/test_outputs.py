from __future__ import annotations

import torch

from hf_detrkd.structures.outputs import ObjectQueries, Predictions
from tests import tiny


def test_queries_name_only_the_fields_that_hold_a_tensor():
    assert ObjectQueries().fields == frozenset()
    queries = ObjectQueries(content=torch.zeros(1, 2, 3), rows=torch.zeros(1, 2, dtype=torch.long))
    assert queries.fields == {"content", "rows"}


def test_selected_queries_keep_only_the_named_fields_that_they_have():
    queries = ObjectQueries(content=torch.randn(1, 2, 3), boxes=tiny.random_boxes(1, 2))
    selected = queries.select(frozenset({"boxes", "points"}))
    assert selected.fields == {"boxes"} and selected.boxes is queries.boxes
    assert queries.fields == {"content", "boxes"}


def test_detached_queries_and_predictions_send_no_gradient_back():
    tensor = torch.randn(1, 2, 4, requires_grad=True)
    rows = torch.zeros(1, 2, dtype=torch.long)
    queries = ObjectQueries(content=tensor * 1, boxes=tensor * 2, rows=rows).detach()
    assert queries.fields == {"content", "boxes", "rows"}
    assert not queries.content.requires_grad and not queries.boxes.requires_grad
    predictions = Predictions(tensor * 1, tensor * 2, tensor * 3, "softmax").detach()
    assert predictions.activation == "softmax"
    assert not any(t.requires_grad for t in (predictions.logits, predictions.boxes, predictions.hidden_states))
    assert Predictions(tensor, tensor).detach().hidden_states is None


def test_scores_of_a_softmax_head_leave_no_object_out_and_of_a_sigmoid_head_leave_nothing_out():
    logits = torch.tensor([[[1.0, 2.0, 3.0]]])
    softmax, sigmoid = (Predictions(logits, torch.zeros(1, 1, 4), activation=kind) for kind in ("softmax", "sigmoid"))
    assert softmax.num_classes == 2 and sigmoid.num_classes == 3
    torch.testing.assert_close(softmax.scores(), torch.exp(logits[..., :2]) / torch.exp(logits).sum())
    torch.testing.assert_close(sigmoid.scores(), 1 / (1 + torch.exp(-logits)))
    assert Predictions(logits.bfloat16(), torch.zeros(1, 1, 4)).scores().dtype == torch.float32
