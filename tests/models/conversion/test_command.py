"""`convert_dino.py` as a command, the names of its classes, and what it refuses."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from hf_detrkd.models import DinoDetrForObjectDetection
from hf_detrkd.models.dino_detr import convert_checkpoint as convert_dino
from hf_detrkd.models.dino_detr import convert_config as convert_dino_config
from hf_detrkd.models.dino_detr import convert_names as convert_dino_names
from tests import ROOT
from tests.models.conversion.checkpoints import BUILDERS, CLASSES, PARTS, both_layouts, original


@both_layouts
def test_whatever_does_not_fit_is_named(layout: str) -> None:
    state = BUILDERS[layout]()
    norms = f"transformer.decoder.layers.2.{PARTS[layout][1]}"
    missing = {name: tensor for name, tensor in state.items() if name != f"{norms}.bias"}
    with pytest.raises(ValueError, match=r"1 missing for decoder\.layers\.2\.self_attn_layer_norm\.bias\."):
        convert_dino.convert(missing, layout)
    with pytest.raises(
        ValueError, match=r"2 unexpected refpoint_embed\.weight, transformer\.encoder\.layers\.0\.more"
    ):
        strange = {"refpoint_embed.weight": torch.ones(2), "transformer.encoder.layers.0.more.weight": torch.ones(2)}
        convert_dino.convert(state | strange, layout)
    with pytest.raises(ValueError, match=rf"1 misshaped {norms}\.weight \(31,\) for \(32,\)\."):
        convert_dino.convert(state | {f"{norms}.weight": torch.ones(31)}, layout)
    with pytest.raises(ValueError, match=r"misshaped label_enc\.weight \(10, 32\) for \(12, 32\)"):
        convert_dino.convert(state | {"label_enc.weight": torch.ones(10, 32)}, layout)
    with pytest.raises(ValueError, match=r"must have a tensor for query_content\.weight, which determines the"):
        convert_dino.convert({name: t for name, t in state.items() if "tgt_embed" not in name}, layout)
    with pytest.raises(ValueError, match=r"a ResNet of 18 to 152 layers, .* and \(2, 2, 2, 0\) blocks"):
        convert_dino.convert({n: t for n, t in state.items() if "layer4." not in n and "res5." not in n}, layout)


@both_layouts
def test_copies_that_differ_and_heads_without_a_layer_are_refused(layout: str) -> None:
    state, name = BUILDERS[layout](), "bbox_embed.1.layers.0.weight"
    copy = f"transformer.decoder.{name}"
    with pytest.raises(ValueError, match=re.escape(f"these differ: {[name, copy]}.")):
        convert_dino.convert(state | {copy: state[copy] + 1e-6}, layout)
    shorter = {name: t for name, t in BUILDERS[layout]().items() if "decoder.layers.2." not in name}
    with pytest.raises(ValueError, match="unexpected"):
        convert_dino.convert(shorter, layout)
    with pytest.raises(ValueError, match="Copies of one tensor must be equal, but these differ"):
        convert_dino.convert(BUILDERS[layout](shared=False), layout, {"share_prediction_heads": True})


def test_files_and_layouts_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a file, but"):
        convert_dino.read_checkpoint(tmp_path / "nowhere.pth")
    torch.save({"model": {"a": torch.ones(1), "b": 3}}, tmp_path / "strange.pth")
    with pytest.raises(
        ValueError, match=r"must contain tensors by name, or under the key `model`, but it contains \['b'\]"
    ):
        convert_dino.read_checkpoint(tmp_path / "strange.pth")
    with pytest.raises(ValueError, match=r"one of \['transformer.level_embed', .*got names such as \['a'\]"):
        convert_dino_names.layout_of({"a": torch.ones(1)})
    (tmp_path / "config.json").write_text('{"model_type": "rt_detr"}')
    with pytest.raises(ValueError, match="must have the model type dino_detr, but it has rt_detr"):
        convert_dino_config.read_fields(str(tmp_path))


def test_the_command_writes_a_model_and_a_processor_that_load(tmp_path: Path) -> None:
    state = original()
    stored = {"model": {f"module.{name}": tensor for name, tensor in state.items()}, "ema_model": {}, "epoch": 11}
    torch.save(stored | {"args": argparse.Namespace(nheads=8)}, tmp_path / "checkpoint.pth")
    names = {str(i): f"class {i}" for i in range(CLASSES)}
    (tmp_path / "names.json").write_text(json.dumps({"id2label": names}))
    command = [sys.executable, "scripts/convert_dino.py", "--checkpoint", str(tmp_path / "checkpoint.pth")]
    command += ["--output_dir", str(tmp_path / "out"), "--config", str(tmp_path / "names.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of the original layout" in done.stdout and "11 classes (class 0, class 1" in done.stdout
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "out")
    assert type(model) is DinoDetrForObjectDetection and list(model.config.id2label.values()) == list(names.values())
    expected = convert_dino.convert(state, "original").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size == {"shortest_edge": 800, "longest_edge": 1333}
    again = convert_dino.convert(state, "original", convert_dino_config.read_fields(str(tmp_path / "out")))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert again.config.id2label == model.config.id2label


@pytest.mark.parametrize(("number", "first", "last"), [(91, "N/A", "toothbrush"), (80, "person", "toothbrush")])
def test_as_many_classes_as_coco_s_have_its_names(number: int, first: str, last: str) -> None:
    names = convert_dino_config.class_names(number)
    assert (len(names), names[0], names[-1]) == (number, first, last)
    assert names.index("zebra") == (24 if number == 91 else 22)
    assert convert_dino_config.class_names(3) == ["LABEL_0", "LABEL_1", "LABEL_2"]
