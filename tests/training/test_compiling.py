"""`--torch_compile`: pieces without a graph break, no compiling after the third step, the results of a plain run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from hf_detrkd.adapters import adapter_for
from hf_detrkd.methods.decoding import decode_together
from hf_detrkd.training.compiling import compiled, pieces_of
from tests import tiny
from tests.adapters.contract import assert_same, foreign, inputs_for, run
from tests.runs import assert_close, make_trainer, weights_of


CHECKED = ("detr", "conditional_detr", "deformable_detr", "dino_detr")
"""Families of transformers whose encoder layers ask on the host, in training, whether all values are finite."""


@pytest.fixture(autouse=True)
def anew() -> None:
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_the_pieces_of_every_family_compile_once(family: str) -> None:
    model, seen = tiny.build(family).requires_grad_(True).train(), []
    with compiled([model], backend="eager"):
        for boxes in (2, 3, 5, 4, 2, 1):
            labels = [{"class_labels": torch.ones(boxes).long(), "boxes": tiny.random_boxes(1, boxes)[0]}] * 2
            model(pixel_values=torch.randn(2, 3, 64, 64), labels=labels).loss.backward()
            seen.append(graphs())
    assert 0 < seen[2] == seen[-1]
    assert len(counters["graph_break"]) <= family.startswith(CHECKED), list(counters["graph_break"])


def test_a_compiled_run_gives_what_a_plain_run_gives(tmp_path: Path) -> None:
    options = {"family": "rt_detr", "method": "kd_detr", "max_steps": 3, "probe": False, "adam_epsilon": 1.0}
    plain = make_trainer(tmp_path / "plain", **options)
    plain.train()
    assert graphs() == 0
    fast = make_trainer(tmp_path / "fast", **options, torch_compile=True, torch_compile_backend="eager")
    fast.train()
    assert graphs() > 5
    assert_close(weights_of(plain), weights_of(fast), 1e-6)
    assert not any("forward" in vars(module) for module in fast.student.modules())


@pytest.mark.parametrize("family", ["rt_detr", "deformable_detr/two_stage"])
def test_compiled_layers_keep_groups_of_queries_apart(family: str) -> None:
    adapter = adapter_for(tiny.build(family))
    sets = [foreign(adapter.spec, count, seed=count) for count in (4, 7)]
    with compiled([adapter.model], backend="eager"):
        output = run(adapter, inputs_for(adapter))
        together = decode_together(output.decode, sets)
        for queries, answers in zip(sets, together, strict=True):
            assert_same(answers, decode_together(output.decode, [queries])[0])


def test_the_teacher_alone_is_compiled_where_it_is_wanted(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, method="kd_detr", max_steps=1, probe=False, teacher_compile=True)
    pieces = list(pieces_of(trainer.distiller.teacher.model))
    seen: list[bool] = []
    pieces[0].register_forward_pre_hook(lambda module, _: seen.append("forward" in vars(module)))
    trainer.train()
    assert seen and all(seen)


def test_a_copy_of_a_compiled_model_has_its_own_weights() -> None:
    model = tiny.build("rt_detr").eval()
    pixels = torch.randn(1, 3, 64, 64)
    with compiled([model], backend="eager"), torch.no_grad():
        other = copy.deepcopy(model)
        for value in other.parameters():
            value.zero_()
        assert not torch.equal(model(pixels).logits, other(pixels).logits)
        assert graphs() > 0 and not other(pixels).last_hidden_state.any()


def test_what_accelerate_was_told_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "reduce-overhead")
    for name in ("control", "student"):  # two trainers of one process
        args = make_trainer(tmp_path / name, max_steps=1).args
        assert (args.torch_compile, args.torch_compile_backend) == (True, "eager")
        assert args.torch_compile_mode == "reduce-overhead"
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    assert not make_trainer(tmp_path / "plain", max_steps=1).args.torch_compile
