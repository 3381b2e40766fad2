"""Cost of a detector: counted against a sum by hand, and timed without changing the model."""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_detrkd.cli.benchmark import latency as benchmark_latency
from hf_detrkd.evaluation import efficiency
from hf_detrkd.evaluation.efficiency import (
    count_gflops,
    device_name,
    evaluating,
    latency_in_turns,
    measure_efficiency,
    time_in_turns,
)
from tests import ROOT, tiny


SIZE = (64, 64)


class Small(nn.Module):
    """A convolution, a linear layer and an attention, whose operations can be counted by hand."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 16)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        rows = self.linear(self.norm(self.conv(pixels)).flatten(2).mT)[:, None]
        return nn.functional.scaled_dot_product_attention(rows, rows, rows)


def test_operations_are_two_for_each_product_and_attention_is_counted() -> None:
    model, cells = Small(), 4 * 6
    convolution, linear = cells * 8 * 3 * 9, cells * 8 * 16
    attention = 2 * cells * cells * 16  # queries by keys, and weights by values
    assert count_gflops(model, (4, 6)) * 1e9 == pytest.approx(2 * (convolution + linear + attention))


def test_figures_have_the_names_of_a_run_file_and_the_model_stays_as_it_was() -> None:
    model = tiny.build("rt_detr").train()
    model.model.backbone.eval()
    model.model.backbone.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure_efficiency(model, SIZE, (1, 3), seconds=0.01)
    assert found["parameters"] == model.num_parameters() and found["gflops"] > 0
    assert found["latency"].keys() == {"1", "3"}
    for size, figures in found["latency"].items():
        assert figures.keys() == {"median_ms", "low_ms", "high_ms", "images_per_second"}
        assert 0 < figures["low_ms"] <= figures["median_ms"] <= figures["high_ms"]
        assert figures["images_per_second"] == pytest.approx(int(size) * 1e3 / figures["median_ms"])
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trained and len(set(trained)) == 2
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    json.dumps(found)


def test_the_mode_comes_back_after_an_error() -> None:
    model = Small()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model.norm.training
        raise RuntimeError
    assert model.training and model.norm.training


def test_models_are_timed_in_turns_and_by_the_clock_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    class Slow(Small):
        def __init__(self, name: str, seconds: float) -> None:
            super().__init__()
            self.name, self.seconds = name, seconds

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            calls.append(self.name)
            clock[0] += self.seconds
            return pixels

    monkeypatch.setattr(efficiency, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    one, two = latency_in_turns([Slow("a", 0.1), Slow("b", 0.3)], SIZE, 4, seconds=1.9)
    assert calls == ["a", "b"] * (len(calls) // 2) and len(calls) == 2 * (
        efficiency.WARM_UP + 10
    )  # 3.8 s in rounds of 0.4
    assert (one["median_ms"], two["median_ms"]) == (pytest.approx(100), pytest.approx(300))
    assert two["images_per_second"] == pytest.approx(4 / 0.3)


def test_the_device_is_named_with_its_threads() -> None:
    name = device_name("cpu")
    assert name.endswith("1 thread") and len(name) > len(", 1 thread")


def test_the_benchmark_prints_ratios_to_the_first_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.build("rt_detr", 64).save_pretrained(tmp_path / "teacher")
    tiny.build("rt_detr", 32).save_pretrained(tmp_path / "student")
    parser = argparse.ArgumentParser()
    benchmark_latency.add_latency(parser)
    models = [str(tmp_path / name) for name in ("teacher", "student")]
    given = parser.parse_args(
        [
            "--models",
            *models,
            "--batch_sizes",
            "1",
            "2",
            "--image_size",
            "64",
            "--seconds",
            "0.01",
            "--dtype",
            "bfloat16",
        ]
    )
    found = given.run(given)
    teacher, student = (found["models"][name] for name in models)
    assert teacher["parameters"] > student["parameters"] and teacher["gflops"] > student["gflops"]
    assert teacher["latency"].keys() == {"1", "2"}
    lines = capsys.readouterr().out.splitlines()
    assert "bfloat16, 64x64 pixels" in lines[0] and len(lines) == 3 + 2 * 2
    assert f"({student['parameters'] / teacher['parameters']:.2f})" in lines[-1] and "(" not in lines[3]


def test_several_are_timed_in_turns_after_a_warm_up() -> None:
    seen: list[str] = []
    times = time_in_turns([lambda: seen.append("a"), lambda: seen.append("b")], 5)
    assert seen == ["a", "b"] * (5 + efficiency.WARM_UP)
    assert [len(one) for one in times] == [5, 5]
    figures = efficiency.figures_of([0.1, 0.2, 0.4], batch_size=8)
    assert figures == pytest.approx({"median_ms": 200, "low_ms": 150, "high_ms": 300, "images_per_second": 40})


def test_no_module_imports_at_its_top_what_windows_lacks() -> None:
    missing = {"fcntl", "grp", "pwd", "resource", "termios"}
    for file in (ROOT / "hf_detrkd").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not missing & set(names), file


def test_the_peak_memory_of_a_process_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficiency.sys, "platform", "win32")
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3 * 2**30))
    monkeypatch.setattr(efficiency.psutil, "Process", lambda: process)
    assert efficiency.peak_memory(torch.device("cpu")) == 3.0
