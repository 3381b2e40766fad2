"""The detections that a detector is judged by, predicts and is exported with: those of its image processor."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from hf_detrkd.adapters import max_detections_of, spec_for
from hf_detrkd.cli import predict
from hf_detrkd.distillation.student import load_image_processor
from hf_detrkd.evaluation import detections_from_predictions
from hf_detrkd.structures.outputs import Predictions
from tests import tiny
from tests.runs import make_trainer


SIZES = torch.tensor([[480, 640], [1000, 999]])
KEPT = {  # of 900 queries and 80 classes; by the authors' code
    "conditional_detr": 100,
    "deformable_detr/plain": 100,
    "deformable_detr/refine": 100,
    "deformable_detr/two_stage": 100,
    "dab-detr": 300,
    "dino_detr": 300,
    "lw_detr": 300,
    "rf_detr": 300,
}


@pytest.mark.parametrize("detector", tiny.FAMILIES)
def test_detections_are_those_of_the_image_processor(build, detector):
    config = tiny.config(detector)
    spec, processor = spec_for(config), load_image_processor(build(detector), image_size=(64, 64))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 900, 80 + (spec.activation == "softmax"), generator=generator)
    boxes = torch.rand(2, 900, 4, generator=generator)
    predictions = Predictions(logits, boxes, activation=spec.activation)
    found = detections_from_predictions(predictions, SIZES, spec.max_detections)
    process = processor.post_process_object_detection
    limit = {"top_k": KEPT[detector]} if "top_k" in inspect.signature(process).parameters else {}
    expected = process(SimpleNamespace(logits=logits, pred_boxes=boxes), threshold=0, target_sizes=SIZES, **limit)
    for ours, theirs in zip(found, expected, strict=True):
        order = theirs["scores"].argsort(descending=True, stable=True)
        assert len(order) == len(ours["scores"]) == KEPT.get(detector, 900)
        assert all(torch.equal(ours[key], theirs[key][order]) for key in theirs)


@pytest.mark.parametrize(("detector", "kept"), [("deformable_detr/two_stage", 100), ("rt_detr", 60), ("detr", 60)])
def test_evaluation_and_prediction_keep_as_many(build, tmp_path, detector, kept):
    trainer = make_trainer(tmp_path, family=detector, student={"num_queries": 60, "two_stage_num_proposals": 60})
    batch = next(iter(trainer.get_eval_dataloader()))
    rows = [trainer.prediction_step(trainer.model, dict(batch), False)[1]["scores"].shape[1]]
    trainer.args.max_detections = 20
    rows.append(trainer.prediction_step(trainer.model, dict(batch), False)[1]["scores"].shape[1])
    model = build(detector, num_queries=60, two_stage_num_proposals=60)
    processor, image = load_image_processor(model, image_size=(128, 128)), Image.new("RGB", (64, 64))
    rows += [len(predict.detect(model, processor, [image], limit)[0]["scores"]) for limit in (None, 20)]
    assert rows == [kept, 20, kept, 20]


def test_a_model_of_another_family_keeps_as_many_as_it_has_queries():
    assert max_detections_of(SimpleNamespace(model_type="some_detr")) is None
    logits, boxes = torch.randn(2, 120, 3), torch.rand(2, 120, 4)
    assert len(detections_from_predictions(Predictions(logits, boxes), SIZES)[0]["scores"]) == 120
