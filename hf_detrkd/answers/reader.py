"""Reads stored answers, memory-mapped, by image and view."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from .columns import last_layer, moved_columns
from .manifest import FILE, Manifest
from .pseudo_labels import PseudoLabels
from .writer import shard_name


METRICS = "teacher_results.json"
ANSWER_FILES = (FILE, METRICS, "README.md", "answers-*.arrow")


def folder_of(name: str | Path, token: str | None = None) -> Path:
    """The folder of stored answers: itself, or the downloaded data set repository `id` or `id@revision`.

    Raises:
        ValueError: there is neither such a folder nor such a repository.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    repo_id, _, revision = str(name).partition("@")
    try:
        patterns = list(ANSWER_FILES)
        found = snapshot_download(
            repo_id, repo_type="dataset", revision=revision or None, allow_patterns=patterns, token=token
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"--teacher_answers must be a folder of hf-detrkd answer, or a data set repository of the Hub, but {name} "
            f"is no folder, and the Hub says: {str(error).splitlines()[0]}"
        ) from error
    return Path(found)


class StoredAnswers:
    """Answers in a folder, read row by row from memory-mapped files.

    Args:
        folder (`str` or `Path`): written by [`AnswerWriter`], or a data set repository, see [`folder_of`].
        token (`str`, *optional*): for the Hub. Default: that of `hf auth login` or the environment.

    Raises:
        ValueError: the folder holds no answers, or not all of them.
    """

    def __init__(self, folder: str | Path, token: str | None = None):
        self.folder = folder_of(folder, token)
        self.manifest = Manifest.read(self.folder)
        shards = self.manifest.shards
        files = [self.folder / shard_name(number, shards) for number in range(shards)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {shards} files of answers in {self.folder} are missing, such as {missing[0]}: "
                "start hf-detrkd answer again, which goes on where it stopped."
            )
        table = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
        keys = table.select_columns(["image_id", "view", "fingerprint"]).with_format("numpy")
        ids, views, prints = (np.asarray(keys[name][:]) for name in ("image_id", "view", "fingerprint"))
        order = np.lexsort((views, ids))
        self._ids, self._views, self._order = ids[order], views[order], order
        self._fingerprints = prints[order]
        self._table = table.with_format("arrow")
        self._pseudo_labels: PseudoLabels | None = None

    def __len__(self) -> int:
        return len(self._order)

    def knows(self, image_id: int, fingerprint: int) -> bool:
        """True if the image was answered as it is now, by its name, size and annotations."""
        first = int(np.searchsorted(self._ids, image_id))
        there = first < len(self._ids) and self._ids[first] == image_id
        return bool(there and self._fingerprints[first] == fingerprint)

    @property
    def image_ids(self) -> np.ndarray:
        """Ids of the answered images, sorted."""
        return np.unique(self._ids)

    def row(self, image_id: int, view: int) -> int:
        """The position of an image's view.

        Raises:
            ValueError: it was not answered.
        """
        first = int(np.searchsorted(self._ids, image_id))
        place = first + view
        if place >= len(self._ids) or (self._ids[place], self._views[place]) != (image_id, view):
            raise ValueError(
                f"The answers in {self.folder} have no row for view {view} of image {image_id}: they belong to other "
                "images, or to fewer views."
            )
        return int(self._order[place])

    @property
    def moved(self) -> bool:
        """True if the teacher saw each image as it is, so that its answers move with the augmentation."""
        return bool(self.manifest.images.get("form") == "moved")

    def with_pseudo_labels(self, threshold: float, classes: Sequence[int], hard: bool) -> StoredAnswers:
        """The same answers, from which labels can be made, see [`PseudoLabels`].

        Args:
            threshold (`float`): lowest score of a detection.
            classes (`Sequence[int]`): the student's class for each of the teacher's, -1 for none.
            hard (`bool`): the labels count as known, also for the detection loss.
        """
        spec, columns = self.manifest.spec, self.manifest.columns
        per_box = frozenset(name for name, column in columns.items() if -1 in column["shape"])
        found = copy.copy(self)
        found._pseudo_labels = PseudoLabels(
            threshold, list(classes), spec["activation"], last_layer(columns), per_box, hard, spec["one_to_one"]
        )
        return found

    def as_labels(self, columns: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Labels that are made from answers, and the answers that go with them.

        Raises:
            ValueError: without [`with_pseudo_labels`].
        """
        if self._pseudo_labels is None:
            raise ValueError("An image has no labels, and the answers none to offer: call with_pseudo_labels().")
        return self._pseudo_labels(columns)

    def read_moved(self, image_id: int, placed: Tensor, least: float) -> dict[str, Tensor]:
        """The columns of an image where a view shows them, see [`moved_columns`]."""
        return moved_columns(self.read(image_id, 0), placed, self.manifest.spec["activation"], least)

    def read(self, image_id: int, view: int) -> dict[str, Tensor]:
        """The columns of one image's view, each in its own shape."""
        table = self._table[self.row(image_id, view)]
        found: dict[str, Any] = {}
        for name, column in self.manifest.columns.items():
            values = table.column(name).chunk(0).flatten().to_numpy(zero_copy_only=False)
            found[name] = torch.from_numpy(values.reshape(column["shape"]).copy())
        return found
