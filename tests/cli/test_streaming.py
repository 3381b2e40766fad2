"""`--streaming` as its users give it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest

from hf_detrkd.artifacts.run_folder import STATE
from hf_detrkd.cli import distill
from hf_detrkd.cli.arguments import parse
from hf_detrkd.cli.run_setup import load_splits
from hf_detrkd.evaluation.efficiency import measure_efficiency
from hf_detrkd.training import finish as finishing
from tests import ROOT, streams, tiny
from tests.hub_server import HubServer
from tests.processes import finish, start


pytestmark = streams.NEEDS_STREAMS


def distill_quickly(cache: Path, argv: list[str]) -> None:
    """A run with a cache of its own, whose latencies are measured for an instant."""
    datasets.config.HF_DATASETS_CACHE = cache
    finishing.measure_efficiency = partial(measure_efficiency, seconds=0.05)
    distill.main(argv)


def test_a_run_from_parquet_files_trains_is_resumed_and_leaves_a_card(tmp_path: Path, shapes_teacher: str) -> None:
    folder = streams.write_parquet(tmp_path / "rows", 12, 2)
    (tmp_path / "student.json").write_text(json.dumps(tiny.config("rt_detr").to_dict()))
    words = ["--dataset_name", str(folder), "--streaming", "--shuffle_buffer_size", "4", "--image_size", "64"]
    words += ["--config_name", str(tmp_path / "student.json"), "--teacher_model_name_or_path", shapes_teacher]
    words += ["--method", "kd_detr", "--general_points", "20", "--per_device_train_batch_size", "2", "--use_cpu"]
    words += ["--min_teacher_map", "0", "--report_to", "none", "--save_steps", "2", "--run_control"]
    words += ["--dataloader_num_workers", "2", "--output_dir", str(tmp_path / "out"), "--logging_steps", "1"]
    log = tmp_path / "log.txt"
    for steps, more in ((4, []), (6, ["--resume_from_checkpoint", "true"])):
        command = [*words, "--max_steps", str(steps), *more]
        printed = finish(start(distill_quickly, (tmp_path / "cache", command), log), log)
        assert f"Read {2 * steps} images of {folder}, split train" in printed
    assert json.loads((tmp_path / "out" / STATE).read_text())["global_step"] == 6
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary) == ["teacher", "control", "distilled"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Trained on a stream of images of `rows (local folder)`" in card and "--streaming" in card


MODEL = ["--config_name", "x.json", "--output_dir", "out", "--dataset_name", "rows"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--streaming", "--labeled_fraction", "0.5"], "--labeled_fraction needs training images .* in any order"),
        (["--streaming", "--unlabeled_dataset_name", "x"], "--unlabeled_dataset_name needs training images"),
        (["--streaming", "--augmentation_views", "4"], "--augmentation_views needs training images"),
        (
            ["--streaming", "--method", "kd_detr", "--teacher_answers", "auto"],
            "--teacher_answers needs training images",
        ),
        (["--streaming", "--check_images", "all"], "--check_images all reads all images before the run"),
        (["--class_names", "a", "b"], "--class_names is for --streaming"),
    ],
)
def test_what_does_not_go_with_a_stream_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse([*MODEL, *words])


def test_only_training_reads_a_stream() -> None:
    with pytest.raises(ValueError, match="Only hf-detrkd distill reads a stream: leave out --streaming"):
        load_splits(parse([*MODEL, "--streaming", "--max_steps", "1"]))


PUSH = """
import datasets
from tests import streams
splits = datasets.DatasetDict({"train": streams.data_set(12), "test": streams.data_set(5)})
splits.push_to_hub("user/rows", num_shards={"train": 3, "test": 1})
"""
READ = """
from itertools import islice
from hf_detrkd.data import DetectionTransform, load_streamed_splits


splits = load_streamed_splits("user/rows")
items = islice(splits.train.with_transform(DetectionTransform((8, 8))), 12)
print(splits.train.num_rows, splits.train.rows.num_shards, len(splits.eval))
print(sorted(int(item["labels"]["image_id"]) for item in items) == list(range(12)))
"""


def test_a_data_set_of_the_hub_is_streamed_and_says_its_length(tmp_path: Path) -> None:
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        for code in (PUSH, READ):
            run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["12", "3", "5", "True"]
