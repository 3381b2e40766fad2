"""Trains from a stream: its loader, its place in checkpoints, and the counts of its rows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..data import RowStream
from ..data.stream import PROGRESS, Progress, Reading, Stamped
from .config import DistillationConfig


if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

logger = logging.get_logger(__name__)
STATE = "stream_state_{}.json"  # of a process, in a checkpoint


class StreamMixin(Trainer):
    """Training from a [`RowStream`], for a `Trainer`; must come before `Trainer` in the base classes.

    Every batch brings the [`Progress`] of the reader that made it. A checkpoint holds the progress of all readers, and
    a resumed run goes on with the next row of each.
    """

    _starts: list[Progress] | None = None  # the readers of this process, in the order of their next batches
    _reader_progress: dict[int, Progress]  # of the readers of this process, as of the last batch
    _resumed: str | None = None  # the checkpoint whose random state is to be loaded

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`; for a stream the counts of its rows are printed at the end."""
        if not isinstance(self.train_dataset, RowStream):
            return super().train(resume_from_checkpoint, *args, **kwargs)
        skipped = self.args.ignore_data_skip
        self._starts, self._resumed = None, resume_from_checkpoint
        if resume_from_checkpoint is not None:
            self._starts = starts_of(Path(resume_from_checkpoint), self._readers, self.args.world_size, skipped)
        if not any(isinstance(one, EpochCallback) for one in self.callback_handler.callbacks):
            self.add_callback(EpochCallback(self))
        self.args.ignore_data_skip = True  # the readers skip rows, which `Trainer` would load first
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.args.ignore_data_skip = skipped
        everyone = gather_object(list(self._reader_progress.values()))
        if self.is_world_process_zero():
            print(report_of(everyone, self.train_dataset.name), flush=True)
        return output

    @property
    def _readers(self) -> list[int]:
        """The numbers of this process's readers."""
        workers = max(1, self.args.dataloader_num_workers)
        return list(range(self.args.process_index * workers, (self.args.process_index + 1) * workers))

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; the readers of a stream share its rows, so that accelerate must not split them again."""
        args, stream = self.args, self.train_dataset
        if not isinstance(stream, RowStream):
            return super().get_train_dataloader()
        starts = self._starts or [Progress(reader) for reader in self._readers]
        self._reader_progress = {one.reader: one for one in starts}
        loader = DataLoader(
            Reading(stream, starts, len(starts) * args.world_size),
            self._train_batch_size,
            collate_fn=Stamped(self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=self.accelerator.non_blocking,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As in `Trainer`; takes the readers' progress out of the batches of a stream."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if isinstance(self.train_dataset, RowStream):
            for batch in batches:
                progress = Progress(*batch.pop(PROGRESS))
                del self._reader_progress[progress.reader]
                self._reader_progress[progress.reader] = progress  # the last one in the dict
            if self._resumed is not None:  # the loader drew a seed for its workers
                self._load_rng_state(self._resumed)
                self._resumed = None
        return batches, num_items

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, RowStream):
            state = {
                "readers": len(self._reader_progress) * self.args.world_size,
                "progress": list(self._reader_progress.values()),
            }
            Path(output_dir, STATE.format(self.args.process_index)).write_text(json.dumps(state))


class EpochCallback(TrainerCallback):
    """Counts the passes over a stream as epochs, since `Trainer` takes a set without a length for endless."""

    def __init__(self, trainer: StreamMixin):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progress, rows = self.trainer._reader_progress.values(), self.trainer.train_dataset.num_rows
        if rows:
            state.epoch = sum(one.images + one.unreadable for one in progress) * args.world_size / rows
        else:
            state.epoch = float(min(one.passes for one in progress))


def starts_of(checkpoint: Path, readers: Sequence[int], processes: int, anew: bool) -> list[Progress]:
    """Where the readers of this process go on, in the order of their next batches.

    Args:
        checkpoint (`Path`)
        readers (`Sequence[int]`): the numbers of this process's readers.
        processes (`int`)
        anew (`bool`): begin the next pass, without the skipping of rows.
    """
    states = [json.loads(file.read_text()) for file in sorted(checkpoint.glob(STATE.format("*")))]
    known = {one[0]: Progress(*one) for state in states for one in state["progress"]}
    same = bool(states) and states[0]["readers"] == len(readers) * processes
    if same and not anew and known.keys() >= set(readers):
        return [one for one in known.values() if one.reader in readers]
    passes = 1 + max((one.passes for one in known.values()), default=-1)
    if not anew:
        had = f"that of {states[0]['readers']} readers" if states else "no place in the stream"
        logger.warning(
            f"{checkpoint.name} holds {had}, and this run has {len(readers) * processes} (processes x "
            f"dataloader_num_workers): it goes on with pass {passes + 1} over the stream, and skips what is left of "
            "the one before."
        )
    found = [Progress(reader, passes) for reader in readers]
    if readers[0] == 0:  # which also keeps the counts
        counts = [sum(values) for values in zip(*(one[3:] for one in known.values()), strict=True)]
        found[0] = Progress(0, passes, 0, *counts)
    return found


def report_of(everyone: Sequence[Progress], name: str) -> str:
    """The counts of a stream's rows in a run."""
    images, unreadable, boxes, dropped, clipped = (sum(values) for values in list(zip(*everyone, strict=True))[3:])
    passes = min(one.passes for one in everyone)
    skipped = f", skipped {unreadable:,} that cannot be read" if unreadable else ""
    return (
        f"Read {images:,} images of {name} ({passes} whole {'pass' if passes == 1 else 'passes'}){skipped}. {boxes:,} "
        f"boxes: dropped {dropped:,} with no area inside the image, clipped {clipped:,} to the image."
    )


def with_passes(train_dataset: Any, eval_dataset: Any, args: DistillationConfig) -> Any:
    """The training set of a run: a stream of the `datasets` library in endless passes, any other as it is.

    Raises:
        ValueError: a stream with arguments that need a length, or as an evaluation set.
    """
    evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    if any(isinstance(one, RowStream) for one in evaluated):
        raise ValueError("eval_dataset must come to an end, got a stream in endless passes: give a DetectionDataset.")
    if isinstance(train_dataset, datasets.IterableDataset):
        train_dataset = RowStream(train_dataset)
    if isinstance(train_dataset, IterableDataset) and args.accelerator_config.dispatch_batches is None:
        args.accelerator_config.dispatch_batches = False  # dispatching would cut the labels of a batch
    if not isinstance(train_dataset, RowStream):
        return train_dataset
    for name in ("eval", "save", "logging"):
        if getattr(args, f"{name}_strategy") == "epoch":
            raise ValueError(f"A stream has no epochs: set --{name}_strategy steps and --{name}_steps, not epoch.")
    if args.max_steps <= 0:
        if train_dataset.num_rows is None:
            raise ValueError("The length of the stream is not known: set --max_steps.")
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        args.max_steps = math.ceil(args.num_train_epochs * train_dataset.num_rows / batch)
    return train_dataset
