"""Asks a teacher everything that a run's methods need, for every view of every image, and stores the answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..answers import STORED, AnswerWriter, Manifest, as_columns, rows_of
from ..answers.columns import is_per_box
from ..answers.manifest import dataset_facts, images_facts, spec_fields
from ..answers.pseudo_labels import confident
from ..data import DetectionDataset
from ..data.pixels import normalized
from ..methods import DistillationMethod
from ..methods.decoding import decode_together
from ..structures.outputs import DetectorOutput, ObjectQueries, Predictions
from ..structures.targets import Targets, is_labeled
from ..structures.teacher_parts import IN_MAPS, STILL, TeacherParts
from .distiller import mixed_seed
from .teacher import Teacher


class Answering:
    """A teacher, and the questions of the methods of a run.

    Args:
        teacher ([`Teacher`])
        methods (`Sequence[DistillationMethod]`)
        seed (`int`): of the methods' random queries.
        padded (`bool`): images are padded, so that the cells of feature maps depend on the batch.
        moved (`bool`): the answers are those to the images as they are, and will move with the augmentation.
        pseudo_threshold (`float`, *optional*): lowest score of the teacher's detections that take the place of the
            boxes of images that nobody labelled; `None` if there are no such images.

    Raises:
        ValueError: a method needs answers that cannot be stored.
    """

    def __init__(
        self,
        teacher: Teacher,
        methods: Sequence[DistillationMethod],
        seed: int,
        padded: bool,
        moved: bool = False,
        pseudo_threshold: float | None = None,
    ):
        self.teacher, self.seed, self.pseudo_threshold = teacher.in_own_order(), seed, pseudo_threshold
        self.methods = [method for method in methods if method.needs_teacher]
        parts = TeacherParts.union(method.reads for method in self.methods)
        if parts.missing is not None:
            raise ValueError(f"Answers cannot be stored for this run: {parts.missing}. Train with the teacher itself.")
        if moved and not parts.moves:
            raise ValueError(
                "Only the teacher's own predictions can move with the image: KD-DETR's specific points, weighted by "
                "score (--general_points 0), and DETRDistill without features (--feature_weight 0). Set "
                "--answers_form views for other terms."
            )
        left_out = STILL if moved else IN_MAPS if padded else frozenset()
        self.parts = replace(parts, queries=parts.queries - left_out)
        self.padded, self.moved = padded, moved

    @property
    def questions(self) -> dict[str, dict[str, Any]]:
        """The questions of each method."""
        asked = {method.name: method.asked_of(self.pseudo_threshold) for method in self.methods}
        return {name: questions for name, questions in asked.items() if questions}

    def columns(
        self, batch: dict[str, Any], stored: torch.dtype
    ) -> tuple[dict[str, Tensor], DetectorOutput, tuple[int, ...]]:
        """The answers to a batch, which holds one view of each image, the teacher's output, and the number of boxes of
        each image."""
        output = self.teacher.of(batch)
        targets = Targets.from_labels(self._labels(batch["labels"], output.layers[-1], stored))
        asked: dict[str, ObjectQueries] = {}
        for method in self.methods:
            if method.questions:
                generator = torch.Generator().manual_seed(mixed_seed(self.seed, batch["view"]))
                requests = method.query_requests(output, output, targets, generator)  # the teacher asks itself
                asked |= {f"{method.name}/{name}": queries for name, queries in requests.teacher.items()}
        answers = decode_together(output.decode, list(asked.values())) if asked else []
        decoded: dict[str, tuple[Predictions, ...]] = dict(zip(asked, answers, strict=True))
        return as_columns(output, decoded, self.parts), output, targets.counts

    def _labels(self, labels: list[dict[str, Any]], found: Predictions, stored: torch.dtype) -> list[dict[str, Any]]:
        """The labels, with the teacher's own detections where there are none: as they will be read, so from the stored
        precision."""
        if self.pseudo_threshold is None:
            return labels
        made = list(labels)
        for row, label in enumerate(labels):
            if not is_labeled(label):
                logits, boxes = found.logits[row].to("cpu", stored), found.boxes[row].to("cpu", torch.float32)
                repeated = None if self.teacher.adapter.spec.one_to_one else boxes
                queries, classes, _ = confident(logits, found.activation, self.pseudo_threshold, repeated)
                device = found.logits.device
                made[row] = label | {"class_labels": classes.to(device), "boxes": boxes[queries].to(device)}
        return made

    def rows(self, batch: dict[str, Any], stored: torch.dtype) -> list[dict[str, Any]]:
        """One row per image."""
        columns, _, counts = self.columns(batch, stored)
        rows = rows_of(columns, self.parts, counts, stored)
        ids = (int(label["image_id"]) for label in batch["labels"])
        return [{"image_id": image, "view": batch["view"]} | row for image, row in zip(ids, rows, strict=True)]

    def manifest(
        self, dataset: DetectionDataset, batch: dict[str, Any], names: dict[str, Any], stored: str, shard: int
    ) -> Manifest:
        """Description of the answers, from those to a first batch.

        Args:
            dataset ([`DetectionDataset`])
            batch (`dict`): of this data set.
            names (`dict[str, Any]`): `name` and `split` of the data set, and the `teacher_image_size` of the run.
            stored (`str`): precision of the numbers.
            shard (`int`): rows per file.
        """
        form = "moved" if self.moved else "views"
        columns, output, counts = self.columns(batch, STORED[stored])
        (row, *_) = rows_of(columns, self.parts, counts, STORED[stored])
        shapes = {
            name: [-1 if is_per_box(name, self.parts) and not i else side for i, side in enumerate(v.shape)]
            for name, v in row.items()
        }
        maps = [] if self.padded or self.moved else output.features["encoder"]
        return Manifest(
            teacher=facts_of(self.teacher),
            spec=spec_fields(self.teacher.spec),
            images=images_facts(dataset, names, form),
            dataset=dataset_facts(dataset, names),
            questions=self.questions,
            seed=self.seed,
            grids=[list(level.values.shape[-2:]) for level in maps],
            columns={name: {"dtype": str(v.dtype), "shape": shapes[name]} for name, v in row.items()},
            stored=stored,
            shard=shard,
            rows=len(dataset) * cast(int, dataset.views),
        )


def facts_of(teacher: Teacher) -> dict[str, Any]:
    """Name, weights and classes of a teacher."""
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    origin = teacher.origin
    return {
        "name": origin.name if origin.source == "hub" else Path(origin.name).name,
        "source": origin.source,
        "revision": origin.revision,
        "dtype": str(teacher.dtype).removeprefix("torch."),  # before the weights, which depend on it
        "weights": digest.hexdigest(),
        "parameters": teacher.model.num_parameters(),
        "classes": list(teacher.class_map.teacher),
    }


class Views(Dataset):
    """All views of all images in one list: view 0 of every image, then view 1, and so on."""

    def __init__(self, dataset: DetectionDataset):
        self.dataset = dataset

    def __getitem__(self, place: int) -> dict[str, Any]:
        view, index = divmod(place, len(self.dataset))
        return self.dataset.view_of(index, view)


def batches_of(shard: range, images: int, size: int) -> list[list[int]]:
    """The places of a file in batches, none of which has two views."""
    found: list[list[int]] = []
    for place in shard:
        if not found or len(found[-1]) == size or place % images == 0:
            found.append([])
        found[-1].append(place)
    return found


def answer_shards(
    answering: Answering,
    dataset: DetectionDataset,
    writer: AnswerWriter,
    numbers: Iterable[int],
    batch_size: int,
    collate: Any,
    device: torch.device,
    workers: int = 0,
) -> Iterator[int]:
    """Answers and writes the files with the given numbers; yields the number of rows after each batch.

    The batches of a file do not depend on which process writes it, nor on where a series was stopped.
    """
    manifest = writer.manifest
    files = {number: batches_of(manifest.places(number), len(dataset), batch_size) for number in numbers}
    batches = iter(
        DataLoader(
            Views(dataset),
            batch_sampler=list(chain.from_iterable(files.values())),
            collate_fn=collate,
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )
    )
    for number, own in files.items():
        rows: list[dict[str, Any]] = []
        for places, batch in zip(own, batches, strict=False):  # the others are of the next files
            moved = normalized({name: on_device(value, device) for name, value in batch.items()})
            with torch.inference_mode():
                found = answering.rows(moved, STORED[manifest.stored])
            prints = (dataset.records[place % len(dataset)].fingerprint for place in places)
            rows += [row | {"fingerprint": value} for row, value in zip(found, prints, strict=True)]
            yield len(found)
        writer.write(number, rows)


def on_device(value: Any, device: torch.device) -> Any:
    """Tensors, and those in lists of dicts, on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list):
        return [{name: on_device(one, device) for name, one in each.items()} for each in value]
    return value
