"""Draws batches with a fixed share of images that nobody labelled."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from .detection import DetectionDataset


class ShareSampler(Sampler[int]):
    """Indices in random order, so that every `batch_size` of them in turn hold the same number of unlabelled images.

    An epoch has every labelled image once; its last batch is filled up with labelled images of the next round. The
    unlabelled images come in rounds of their own, which go on from epoch to epoch. The order depends only on the seed
    and the data set's epoch, so that it is the same on every process and after a resume.

    Args:
        dataset ([`DetectionDataset`]): with labelled and unlabelled images.
        batch_size (`int`): of one process.
        fraction (`float`): share of unlabelled images in a batch, above 0 and below 1.
        seed (`int`)

    Raises:
        `ValueError`: a batch of one image, which cannot hold both kinds.
    """

    def __init__(self, dataset: DetectionDataset, batch_size: int, fraction: float, seed: int) -> None:
        if batch_size < 2:
            raise ValueError(
                "Batches need at least 2 images on each process, to hold labelled and unlabelled ones: set "
                "--per_device_train_batch_size."
            )
        labeled = dataset.labeled()
        self.dataset, self.seed = dataset, seed
        self.labeled, self.unlabeled = np.flatnonzero(labeled), np.flatnonzero(~labeled)
        self.unknown = min(max(1, round(fraction * batch_size)), batch_size - 1)
        self.known = batch_size - self.unknown

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.labeled) // self.known)

    def __len__(self) -> int:
        return self.batches * (self.known + self.unknown)

    def __iter__(self) -> Iterator[int]:
        epoch = self.dataset.epoch
        generator = np.random.default_rng((self.seed, epoch, 0))
        order = generator.permutation(self.labeled)
        known = np.resize(order, (self.batches, self.known))
        unknown = self._unlabeled(epoch * self.batches * self.unknown).reshape(self.batches, self.unknown)
        yield from np.concatenate([known, unknown], 1).reshape(-1).tolist()

    def _unlabeled(self, start: int) -> np.ndarray:
        """Those of an epoch, from a place in an endless row of random rounds."""
        size, count = len(self.unlabeled), self.batches * self.unknown
        rounds = range(start // size, (start + count - 1) // size + 1)
        row = [np.random.default_rng((self.seed, number, 1)).permutation(self.unlabeled) for number in rounds]
        first = start - rounds[0] * size
        return np.concatenate(row)[first : first + count]
