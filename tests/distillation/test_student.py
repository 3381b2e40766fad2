"""Students from checkpoints with other classes, from configs, with a classifier's backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_detrkd.adapters import adapter_for
from hf_detrkd.distillation.student import (
    build_student,
    load_backbone_weights,
    load_image_processor,
    load_student,
    with_classes,
)
from tests import tiny


NEW = ["star", "moon", "circle"]  # two of them are in tiny.LABELS, in another order


def answers(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=tiny.batch()["pixel_values"]).logits


@pytest.mark.parametrize("family", ["detr", "table-transformer", "deformable_detr/plain", "deformable_detr/refine"])
def test_rows_of_classes_with_the_same_name_are_kept(family: str, tmp_path: Path) -> None:
    model = tiny.build(family)
    model.save_pretrained(tmp_path)
    student = load_student(str(tmp_path), NEW)
    assert list(student.config.id2label.values()) == NEW
    old, new = answers(model), answers(student)
    kept = [(NEW.index(name), tiny.LABELS.index(name)) for name in NEW if name in tiny.LABELS]
    assert len(kept) == 2
    for index, old_index in kept:
        torch.testing.assert_close(new[..., index], old[..., old_index])
    if adapter_for(model).spec.activation == "softmax":
        torch.testing.assert_close(new[..., -1], old[..., -1])
    assert not torch.allclose(new[..., NEW.index("moon")], old[..., 0])


def test_every_head_of_a_two_stage_model_keeps_its_rows() -> None:
    for family in ("rt_detr", "deformable_detr/two_stage"):
        model = tiny.build(family)
        student = with_classes(model, NEW)
        old, new = model.state_dict(), student.state_dict()
        grown = [name for name in new if new[name].shape != old[name].shape]
        assert len(grown) >= 2 * tiny.NUM_LAYERS
        for name in grown:
            assert torch.equal(new[name][0], old[name][tiny.LABELS.index("star")]), name
        for name in set(new) - set(grown):
            assert torch.equal(new[name], old[name]), name


def test_the_same_classes_leave_a_checkpoint_as_it_is_and_another_order_moves_rows() -> None:
    model = tiny.build("deformable_detr/plain")
    assert with_classes(model, tiny.LABELS) is model
    turned = with_classes(model, tiny.LABELS[::-1])
    torch.testing.assert_close(answers(turned), answers(model).flip(-1))


def test_a_student_from_a_config_file_has_live_batch_norm_at_one(tmp_path: Path) -> None:
    config = tiny.config("rt_detr")
    file = tmp_path / "student.json"
    file.write_text(json.dumps(config.to_dict()))
    model = build_student(str(file), ["a", "b"])
    assert model.config.label2id == {"a": 0, "b": 1}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all((norm.weight == 1).all() for norm in norms)


def test_a_classifier_gives_its_weights_to_the_backbone(tmp_path: Path) -> None:
    model, other = tiny.build("rt_detr"), tiny.build("rt_detr", seed=5)
    prefix = "model.backbone.model."
    own = {n.removeprefix(prefix): v.contiguous() for n, v in other.state_dict().items() if n.startswith(prefix)}
    save_file(own | {"classifier.weight": torch.zeros(3)}, tmp_path / "good.safetensors")
    load_backbone_weights(model, str(tmp_path / "good.safetensors"))
    given = other.state_dict()
    for name, value in model.state_dict().items():
        same = torch.equal(value, given[name])
        assert same or not name.startswith(prefix), name
    assert not torch.equal(model.model.enc_score_head.weight, other.model.enc_score_head.weight)


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    model = tiny.build("rt_detr")
    with pytest.raises(ValueError, match="does not exist"):
        load_backbone_weights(model, str(tmp_path / "none.safetensors"))
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not for this backbone: its names look like"):
        load_backbone_weights(model, str(tmp_path / "other.safetensors"))
    first = next(n for n in model.state_dict() if n.startswith("model.backbone.model."))
    save_file({first.removeprefix("model.backbone.model."): torch.zeros(1)}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="tensors are missing or have another shape"):
        load_backbone_weights(model, str(tmp_path / "part.safetensors"))


def test_the_image_processor_has_the_asked_size_with_or_without_padding(family: str) -> None:
    model = tiny.build(family)
    fixed = load_image_processor(model, image_size=(96, 128))
    assert dict(fixed.size) == {"height": 96, "width": 128}
    assert not fixed.do_pad
    kept = load_image_processor(model, image_size=(96, 128), keep_aspect_ratio=True)
    assert dict(kept.size) == {"shortest_edge": 96, "longest_edge": 128}
    assert kept.do_pad


def test_an_aspect_ratio_is_kept_only_within_a_size() -> None:
    with pytest.raises(ValueError, match="keep_aspect_ratio needs image_size"):
        load_image_processor(tiny.build("rt_detr"), keep_aspect_ratio=True)
    load_image_processor(tiny.build("detr"), keep_aspect_ratio=True)  # it does so by itself
