"""Faster R-CNN as a student: other classes, config files, image processor, frozen stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import DetrConfig

from hf_detrkd.adapters import adapter_for
from hf_detrkd.cli import arguments, run_setup
from hf_detrkd.distillation.freezing import freeze_stages, usual_stages
from hf_detrkd.distillation.student import build_student, load_image_processor, load_student, with_classes
from hf_detrkd.models import FasterRCNNForObjectDetection
from hf_detrkd.models.compat import processor_class
from tests import tiny
from tests.adapters.faster_rcnn.passes import foreign, run
from tests.models.faster_rcnn import MOBILENET, RESNET, SIZES, SMALL, build, config


NEW = ["star", "moon", "circle"]  # two of them are in tiny.LABELS, in another order


@pytest.mark.parametrize("name", [SMALL, MOBILENET])
def test_rows_of_classes_with_the_same_name_are_kept_behind_the_background(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    student = load_student(str(tmp_path), NEW)
    assert type(student) is FasterRCNNForObjectDetection
    assert list(student.config.id2label.values()) == NEW and student.config.num_labels == 3
    old, new = model.state_dict(), student.state_dict()
    heads = {f"roi_heads.box_predictor.{part}": rows for part, rows in (("cls_score", 1), ("bbox_pred", 4))}
    for head, rows in heads.items():
        for kind in ("weight", "bias"):
            before, after = old[f"{head}.{kind}"], new[f"{head}.{kind}"]
            assert len(after) == 4 * rows
            sources = {0: 0, 1: 1 + tiny.LABELS.index("star"), 3: 1 + tiny.LABELS.index("circle")}
            for index, source in sources.items():
                for row in range(rows):
                    assert torch.equal(after[index * rows + row], before[source * rows + row]), (head, index)
            moon = after[2 * rows : 3 * rows]
            assert not any(torch.equal(moon, before[i * rows : (i + 1) * rows]) for i in range(6))
    for key, value in new.items():
        assert key.rsplit(".", 1)[0] in heads or torch.equal(value, old[key]), key


@torch.no_grad()
def test_kept_classes_are_answered_as_before():
    teacher = build()
    student, queries = with_classes(teacher, NEW).eval(), foreign()
    (old,), (new,) = (run(adapter_for(model))[0].decode(queries) for model in (teacher, student))
    for index, source in ((0, tiny.LABELS.index("star")), (2, tiny.LABELS.index("circle")), (-1, -1)):
        torch.testing.assert_close(new.logits[..., index], old.logits[..., source])
        if index >= 0:
            torch.testing.assert_close(new.class_boxes[:, :, index], old.class_boxes[:, :, source])
    assert with_classes(teacher, tiny.LABELS) is teacher


@pytest.mark.parametrize("name", [SMALL, MOBILENET])
def test_a_student_from_a_config_file_and_its_image_processor(name, tmp_path: Path):
    file = tmp_path / "student.json"
    file.write_text(json.dumps(config(name).to_dict()))
    model = build_student(str(file), ["a", "b"])
    assert type(model) is FasterRCNNForObjectDetection and model.config.label2id == {"a": 0, "b": 1}
    assert model.roi_heads.box_predictor.cls_score.out_features == 3
    assert model.config.level_widths == config(name).level_widths
    assert model.roi_heads.score_thresh == 0.0
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all((norm.weight == 1).all() for norm in norms)
    processor = load_image_processor(model, image_size=(64, 96), keep_aspect_ratio=True)
    assert type(processor) is processor_class(DetrConfig)
    assert dict(processor.size) == {"shortest_edge": 64, "longest_edge": 96} and processor.do_pad
    batch = processor([torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in SIZES], return_tensors="pt")
    output = run(adapter_for(model.eval()), dict(batch))[0]
    assert output.found.logits.shape == (3, 100, 3)
    assert output.features["neck"][0].padding.any()


@pytest.mark.parametrize("name", [SMALL, RESNET, MOBILENET])
def test_backbone_parameters_are_those_of_the_body_and_no_others(name):
    model = FasterRCNNForObjectDetection(config(name))
    own = {id(parameter) for parameter in model.backbone.body.parameters()}
    found = {parameter_name for parameter_name, _ in adapter_for(model).backbone_parameters()}
    assert found == {name for name, parameter in model.named_parameters() if id(parameter) in own} != set()


@pytest.mark.parametrize("name", [SMALL, RESNET])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_stem_and_first_stages_can_be_frozen(name, number):
    model = FasterRCNNForObjectDetection(config(name))
    frozen = freeze_stages(model, number)
    body = model.backbone.body
    parts = [[body.conv1, body.bn1], [body.layer1], [body.layer2]][:number]
    own = {id(parameter) for modules in parts for module in modules for parameter in module.parameters()}
    wanted = {name for name, parameter in model.named_parameters() if id(parameter) in own}
    assert set(frozen) == wanted == {key for key, value in model.named_parameters() if not value.requires_grad}


@pytest.mark.parametrize(("given", "frozen"), [(None, True), (False, False)])
def test_trained_backbone_weights_freeze_what_torchvision_freezes(given, frozen, tmp_path):
    file, weights = tmp_path / "student.json", tmp_path / "backbone.safetensors"
    file.write_text(json.dumps(config(SMALL).to_dict() | {"frozen_batch_norm": given}))
    backbone = timm.create_model(config(SMALL).backbone, **(config(SMALL).backbone_kwargs or {}))
    save_file(backbone.state_dict(), weights)
    words = [
        "--dataset_name",
        "shapes",
        "--config_name",
        str(file),
        "--output_dir",
        str(tmp_path),
        "--method",
        "none",
        "--use_cpu",
        "true",
    ]
    for further in ([], ["--backbone_weights", str(weights)]):
        asked = arguments.parse(words + further)
        model, _ = run_setup.make_student(asked.script, ["a", "b"], asked.config)
        live = [module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        assert bool(live) != bool(further and frozen)
        assert asked.config.freeze_stages == (2 if further else None)
    given = backbone.state_dict()["layer2.0.conv1.weight"]
    assert torch.equal(model.backbone.body.layer2[0].conv1.weight, given)


def test_a_backbone_without_such_stages_is_refused():
    model = FasterRCNNForObjectDetection(config(MOBILENET))
    assert usual_stages(model) == 0
    with pytest.raises(ValueError, match="the backbone of this faster_rcnn has no part 0"):
        freeze_stages(model, 1)
