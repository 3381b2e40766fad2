"""Training from streams: a resumed run is the straight one, processes share the rows, and what cannot work is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from hf_detrkd import DistillationTrainer
from hf_detrkd.data import AugmentationConfig, DetectionStream, DetectionTransform, RowStream
from hf_detrkd.training.streaming import STATE, starts_of
from tests import streams
from tests.runs import SIZE, assert_close, make_trainer, weights_of
from tests.together import run_together


pytestmark = streams.NEEDS_STREAMS


OPTIONS: dict[str, Any] = {
    "method": "kd_detr",
    "method_config": {"general_points": 4},
    "save_strategy": "steps",
    "save_steps": 1,
    "probe": False,
    "max_gradient_ratio": 0,
}
TRANSFORM = DetectionTransform(SIZE, augmentation=AugmentationConfig())


class Recording(DistillationTrainer):
    """Keeps the ids of the images of every batch."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.seen = [*getattr(self, "seen", []), *(int(label["image_id"]) for label in inputs["labels"])]
        return super().compute_loss(model, inputs, *args, **kwargs)


def stream_of(count: int = 11, shards: int = 4, **options: Any) -> DetectionStream:
    rows = streams.stream(count, shards, **options)
    skips = bool(options.get("changes"))
    stream = DetectionStream(rows, "data", shuffle_buffer_size=5, skip_unreadable_images=skips)
    return stream.with_transform(TRANSFORM, 3)


def trainer_on(folder: str | Path, data: Any, **options: Any) -> Any:
    """A trainer of tiny models on a training set of one's own."""
    base = make_trainer(folder, **OPTIONS | options)
    return Recording(
        model=base.student,
        args=base.args,
        teacher_model=base.distiller.teacher and base.distiller.teacher.model,
        method_config=base._method_config,
        train_dataset=data,
        eval_dataset=base.eval_dataset,
        processing_class=base.processing_class,
    )


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (2, 1), (3, 2)])
def test_a_resumed_run_is_the_straight_one(tmp_path: Path, workers: int, accumulation: int) -> None:
    """Also within the second pass, and with an image that cannot be read."""
    options = {"dataloader_num_workers": workers, "gradient_accumulation_steps": accumulation, "max_steps": 7}
    changes = {4: {"image": {"bytes": b"torn", "path": "4.png"}}}
    straight = trainer_on(tmp_path / "straight", stream_of(changes=changes), **options)
    straight.train()
    assert len(straight.seen) == 14 * accumulation and 4 not in straight.seen
    for step in (2, 6):
        resumed = trainer_on(tmp_path / f"from {step}", stream_of(changes=changes), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert resumed.args.ignore_data_skip is False, "the arguments are as they were given"
        assert resumed.seen == straight.seen[2 * accumulation * step :]
        assert_close(weights_of(resumed), weights_of(straight), 0.0)
        assert resumed.state.log_history[-2]["epoch"] == straight.state.log_history[-2]["epoch"]


def test_the_counts_of_a_run_are_printed_and_go_on_after_a_resume(tmp_path: Path, capsys) -> None:
    outside = {"objects": [{"bbox": [30.0, 20.0, 30.0, 30.0], "category": 0}, {"bbox": [1, 1, 0, 1], "category": 0}]}
    changes = {4: {"image": {"bytes": b"torn", "path": "4.png"}}, 5: outside}
    for folder, resume in (("one", None), ("two", str(tmp_path / "one" / "checkpoint-3"))):
        trainer = trainer_on(tmp_path / folder, stream_of(changes=changes), method="none", max_steps=5)
        trainer.train(resume_from_checkpoint=resume)
        printed = capsys.readouterr().out
        assert "Read 10 images of data (0 whole passes), skipped 1 that cannot be read." in printed
        assert "11 boxes: dropped 1 with no area inside the image, clipped 1 to the image." in printed


def test_epochs_are_the_passes_over_the_stream(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path / "unknown", stream_of(), method="none", max_steps=12)
    trainer.train()
    assert [row["epoch"] for row in trainer.state.log_history[:12]] == [0] * 5 + [1] * 6 + [2]
    known = stream_of(12)
    known.num_rows = 12
    trainer = trainer_on(tmp_path / "known", known, method="none", max_steps=-1, num_train_epochs=1.5)
    trainer.train()
    assert trainer.state.max_steps == 9 and trainer.state.log_history[-2]["epoch"] == 1.5


def test_with_other_workers_the_next_pass_begins(tmp_path: Path, caplog) -> None:
    options = {"method": "none", "max_steps": 6}
    trainer_on(tmp_path, stream_of(12), **options).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    other = trainer_on(tmp_path / "other", stream_of(12), dataloader_num_workers=2, **options)
    other.train(resume_from_checkpoint=checkpoint)
    assert "of 1 readers, and this run has 2" in caplog.text and "it goes on with pass 2" in caplog.text
    assert {one.passes for one in other._reader_progress.values()} == {1}
    assert sum(one.images for one in other._reader_progress.values()) == 12, "the counts go on"
    caplog.clear()
    anew = trainer_on(tmp_path / "anew", stream_of(12), ignore_data_skip=True, **options)
    anew.train(resume_from_checkpoint=checkpoint)
    assert not caplog.text and anew.args.ignore_data_skip
    assert [one.passes for one in anew._reader_progress.values()] == [1]


def test_a_checkpoint_without_a_place_begins_with_the_first_pass(tmp_path: Path, caplog) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    assert [tuple(one) for one in starts_of(tmp_path / "checkpoint-3", [1], 2, False)] == [(1, 0, 0, 0, 0, 0, 0, 0)]
    assert "checkpoint-3 holds no place in the stream" in caplog.text


def test_the_probe_takes_the_first_batches(tmp_path: Path, capsys) -> None:
    nothing = {number: {"objects": []} for number in range(9)}
    trainer = trainer_on(tmp_path, stream_of(changes=nothing), probe=True, max_steps=1)
    trainer.train()
    assert "gradient" in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of the 11 images has a box"):
        empty = stream_of(changes={number: {"objects": []} for number in range(11)})
        trainer_on(tmp_path / "empty", empty, max_steps=1).train()


def items(count: int, shards: int) -> datasets.IterableDataset:
    """Ready items, shuffled by their owner."""

    def item(row: dict[str, Any]) -> dict[str, Any]:
        boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
        labels = {"image_id": torch.tensor([row["n"]]), "class_labels": torch.tensor([row["n"] % 6]), "boxes": boxes}
        return {"pixel_values": torch.full((3, *SIZE), row["n"] / count), "labels": labels}

    rows = datasets.Dataset.from_dict({"n": list(range(count))}).to_iterable_dataset(shards)
    return rows.shuffle(seed=1, buffer_size=4).map(item, remove_columns=["n"])


def test_a_stream_of_ready_items_trains_in_passes(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path, items(8, 2), method="none", max_steps=8)
    assert isinstance(trainer.train_dataset, RowStream)
    trainer.train()
    assert sorted(trainer.seen[:8]) == sorted(trainer.seen[8:]) == list(range(8))
    assert trainer.seen[:8] != trainer.seen[8:]
    wrong = items(8, 2).map(lambda item: item | {"labels": {}})
    with pytest.raises(ValueError, match="Item 0 of train_dataset must have labels with class_labels and boxes"):
        trainer_on(tmp_path, wrong, method="none").train()


def test_what_a_stream_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The length of the stream is not known: set --max_steps"):
        trainer_on(tmp_path, stream_of(), max_steps=-1)
    with pytest.raises(ValueError, match="A stream has no epochs: set --eval_strategy steps and --eval_steps, not"):
        trainer_on(tmp_path, stream_of(), eval_strategy="epoch")
    base = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="eval_dataset must come to an end, got a stream in endless passes"):
        DistillationTrainer(model=base.student, args=base.args, eval_dataset=stream_of())
    big = stream_of().with_transform(DetectionTransform((50, 50)))
    with pytest.raises(ValueError, match="takes images whose sides are multiples of 32 pixels, got 50x50"):
        trainer_on(tmp_path, big)


# --- two processes ---


class Plain(torch.utils.data.IterableDataset):
    """A stream that is not of the `datasets` library."""

    def __init__(self, items: list[Any]):
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


def train_together(folder: str, kind: str, options: dict[str, Any], resume: str | None) -> None:
    """In two processes: prints the images that each has trained on."""
    data = {
        "detection": lambda: stream_of(24),
        "items": lambda: items(24, 3),
        "plain": lambda: Plain(list(items(24, 1))),
    }[kind]()
    trainer = trainer_on(folder, data, **options)
    assert trainer.args.world_size == 2
    trainer.train(resume_from_checkpoint=resume)
    print(f"seen: {json.dumps(trainer.seen)}")
    if trainer.is_world_process_zero():
        torch.save(weights_of(trainer), Path(folder, "weights.pt"))
    trainer.accelerator.wait_for_everyone()


def seen_in(printed: list[str]) -> list[list[int]]:
    lines = [line for text in printed for line in text.splitlines() if line.startswith("seen: ")]
    return [json.loads(line.removeprefix("seen: ")) for line in lines]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "workers"), [("detection", 0), ("detection", 2), ("items", 0), ("plain", 0)], ids=lambda value: str(value)
)
def test_two_processes_see_every_row_once(tmp_path: Path, kind: str, workers: int) -> None:
    """24 rows, 2 at a time: a pass has 6 steps."""
    options = {"method": "none", "max_steps": 6, "dataloader_num_workers": workers}
    first, second = seen_in(run_together(train_together, str(tmp_path), kind, options, None))
    assert len(first) == len(second) == 12
    assert sorted(first + second) == list(range(24))


@pytest.mark.distributed
def test_two_processes_resume_where_they_were(tmp_path: Path) -> None:
    options = {"method": "none", "max_steps": 8, "dataloader_num_workers": 2}
    straight = seen_in(run_together(train_together, str(tmp_path / "one"), "detection", options, None))
    checkpoint = str(tmp_path / "one" / "checkpoint-5")
    assert all(Path(checkpoint, STATE.format(process)).is_file() for process in range(2))
    printed = run_together(train_together, str(tmp_path / "two"), "detection", options, checkpoint)
    assert seen_in(printed) == [seen[10:] for seen in straight]
    assert_close(*(torch.load(tmp_path / name / "weights.pt") for name in ("one", "two")), 0.0)
    assert "Read 32 images of data (1 whole pass)" in printed[0] and "Read" not in printed[1]
