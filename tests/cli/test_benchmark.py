"""The benchmark's two sides compute the same, on a small case; its times are for reading, not for testing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hf_detrkd.adapters import ADAPTERS
from hf_detrkd.cli import distill
from hf_detrkd.cli.benchmark import main as benchmark
from hf_detrkd.cli.benchmark import methods as benchmark_methods
from hf_detrkd.cli.benchmark import series as series_module
from hf_detrkd.cli.benchmark.criterion_case import drops_denoising
from hf_detrkd.cli.benchmark.operations import HostCopies, Operations
from tests import streams
from tests.data.layouts.conftest import Files
from tests.data.layouts.writers import write_coco
from tests.processes import finish, start


def test_the_losses_of_every_family_are_equal_and_their_times_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [
        "--batch_size",
        "2",
        "--queries",
        "12",
        "--boxes",
        "4",
        "--layers",
        "2",
        "--classes",
        "5",
        "--groups",
        "3",
        "--denoising",
        "8",
        "--repeats",
        "1",
    ]
    file = tmp_path / "figures.json"
    benchmark.main(["criterion", *sizes, "--output_file", str(file)])
    printed = capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert figures.keys() == ADAPTERS.keys() - {"dino_detr", "faster_rcnn"}
    assert all(row["equal"] and row["ours_ms"] > 0 for row in figures.values())
    faulty = {"d_fine", "deimv2"} if drops_denoising() else {"d_fine", "deimv2", "rt_detr", "rt_detr_v2"}
    for name, row in figures.items():
        assert (row["right_loss"] != row["transformers_loss"]) == (name in faulty)
        assert f"| {name} |" in printed


def run_in_a_fork(command: list[str], folder: Path) -> None:
    """A run of a series, without the seconds of its imports."""
    assert command[:3] == [sys.executable, "-m", "hf_detrkd.cli.distill"]
    finish(start(distill.main, (command[3:],), folder / "log.txt"), folder / "log.txt")


def test_methods_are_compared_at_equal_steps_and_at_equal_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    series = {
        "recipe": "scripts/recipes/quickstart_live.yaml",
        "arguments": {
            "run_control": False,
            "dataset_name": "shapes",
            "max_train_samples": 4,
            "max_eval_samples": 2,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "min_teacher_map": 0,
        },
        "variants": {
            "control": {"method": "none"},
            "taught": {"method": "kd_detr,clockdistill"},
            "stored": {"method": "kd_detr", "teacher_answers": "auto", "augmentation_views": 2},
        },
    }
    (tmp_path / "series.yaml").write_text(yaml.safe_dump(series))
    arguments = ["--variants", str(tmp_path / "series.yaml"), "--seeds", "0", "1", "--cost_steps", "3", "--jobs", "2"]
    files = ["--output_dir", str(tmp_path / "runs"), "--output_file", str(tmp_path / "figures.json")]
    monkeypatch.setattr(series_module, "run", run_in_a_fork)
    benchmark.main(["methods", *arguments, *files, "--threads", "1"])
    found = json.loads((tmp_path / "figures.json").read_text())
    costs = found["costs"]
    assert costs["control"]["teacher"] == costs["control"]["losses"] == 0 < costs["taught"]["teacher"]
    assert all(costs["taught"][part] > 0 for part in ("decoder passes", "losses"))
    assert sum(costs["taught"][part] for part in ("teacher", "decoder passes", "losses")) < costs["taught"]["step"]
    assert all(cost["reading"] > 0 for cost in costs.values())
    assert costs["control"]["answers"] == costs["taught"]["answers"] == 0 < costs["stored"]["answers"]
    assert found["seconds"] == max(cost["answers"] + 2 * cost["step"] for cost in costs.values())
    assert [len(runs) for runs in found["equal steps"].values()] == [2, 2, 2]
    steps = max(1, round(found["seconds"] / costs["control"]["step"]))
    state = json.loads((tmp_path / "runs" / "equal_seconds" / "control" / "1" / "trainer_state.json").read_text())
    assert state["global_step"] == steps
    assert f"| control | {steps} |" in capsys.readouterr().out


def test_gains_are_given_with_standard_errors() -> None:
    runs = {"one": [0.1, 0.2, 0.3], "two": [0.4, 0.4, 0.7]}
    results = {name: [{"eval_map": v, "eval_map_50": v} for v in values] for name, values in runs.items()}
    lines = benchmark_methods.gain_table(results, {"one": 5, "two": 6}).splitlines()
    # Standard deviations 10 and 17.3, errors 5.8 and 10; of the difference 11.5.
    assert lines[2] == "| one | 5 | 20.0 ± 5.8 | 20.0 ± 5.8 |  |  |"
    assert lines[3] == "| two | 6 | 50.0 ± 10.0 | 50.0 ± 10.0 | +30.0 ± 11.5 | 2.6 |"


def test_the_pipeline_is_measured_beside_torchvision_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coco(Files(tmp_path / "files", {"train": 3, "val": 3}).splits(), tmp_path / "data")
    file = tmp_path / "figures.json"
    words = f"pipeline --dataset_name {tmp_path}/data --image_size 32 --teacher_image_size 48 --batch_size 2"
    benchmark.main([*words.split(), "--repeats", "1", "--output_file", str(file)])
    found = json.loads(file.read_text())
    assert found["images"] == 3 and found["image_size"] == [32, 32]
    for kind in ("training", "evaluation"):
        assert {"hf_detrkd", "torchvision's reference"} <= found["images_per_second"][kind].keys()
    assert all(rate > 0 for each in found["images_per_second"].values() for rate in each.values())
    assert "| training | hf_detrkd | " in capsys.readouterr().out


def test_methods_let_the_host_wait_no_more_often_than_plain_training(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    chosen = ["--only", "control", "detrdistill", "--output_dir", str(tmp_path), "--output_file", str(file)]
    benchmark.main(["operations", *chosen])
    control, method = json.loads(file.read_text()).values()
    assert control["waits"] == method["waits"] >= 1
    assert control["teacher"] == control["losses"] == control["decoder passes"] == 0
    parts = [method[part] for part in ("teacher", "losses", "decoder passes")]
    assert min(parts) > 0 and method["operations"] > control["operations"] + sum(parts)


def test_the_operations_of_a_step_leave_out_views_reading_and_the_optimizer() -> None:
    found, values = Operations(), torch.ones(4, 4)
    with found, HostCopies(found), found.part("step"):
        (values.view(16) + 1).sum().item()
        with found.part("losses"):
            values.to(torch.float64)[values > 0].cpu()
        with found.part("optimizer"):
            values.mul_(2).cpu()
    assert found.counts == {"operations": 6, "step": 3, "losses": 3, "casts": 1, "waits": 3}


@streams.NEEDS_STREAMS
def test_a_stream_and_the_disk_read_every_image_of_a_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--rows", "64", "--shards", "2", "--side", "32", "--batch_size", "8", "--shuffle_buffer_size", "16"]
    benchmark.main(["streaming", *sizes, "--output_file", str(file)])
    figures = json.loads(file.read_text())
    assert {kind: row["images"] for kind, row in figures.items()} == {"stream": 64, "on the disk": 64}
    assert figures["stream"]["disk"] < figures["on the disk"]["disk"]
    assert "| stream |" in capsys.readouterr().out


def test_the_evaluator_and_coco_files_are_measured_by_their_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    sizes = "--images 20 --boxes 3 --detections 12 --classes 4 --coco_images 3000 --coco_boxes 12000"
    benchmark.main(["scale", *sizes.split(), "--output_file", str(file)])
    found = json.loads(file.read_text())
    evaluation = found["evaluation"]["20"]
    assert {"hf_detrkd", "faster-coco-eval, a dict per box", "hf_detrkd, results file"} <= evaluation.keys()
    values = {round(parts["map"], 9) for parts in evaluation.values()}
    assert len(values) == 1 and 0 < min(values) < 1
    assert {parts["images"] for parts in found["loading"].values()} == {3000}
    assert len({parts["repaired"] for parts in found["loading"].values()}) == 1
    seconds = {name: parts["loading"]["seconds"] for name, parts in found["loading"].items()}
    assert seconds.keys() == {"hf_detrkd, without an index", "hf_detrkd, first time", "hf_detrkd, from the index"}
    assert "| hf_detrkd | computing | " in capsys.readouterr().out
