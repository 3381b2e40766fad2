"""Loads a detection data set from any source: `dataset_name` is one argument for all of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import datasets as hf_datasets

from .checks import find_readable_images
from .detection import DetectionDataset
from .errors import DatasetError
from .joining import with_common_classes
from .layouts import find_source, source_of
from .layouts.coco import coco_source
from .layouts.rows import load_splits, rows_source
from .layouts.source import Source, drawn
from .records import ImageRecord, Records, SelectedRecords
from .shapes import SHAPE_CLASSES, SHAPES_SIZES, ShapesRecords
from .unlabeled import JoinedRecords, image_files, split_labels, with_unlabeled


logger = logging.getLogger(__name__)

TRAIN_SPLITS = ("train", "train2017", "training")
EVAL_SPLITS = ("validation", "val", "valid", "val2017", "dev", "test")

Listed: TypeAlias = Records | Sequence[ImageRecord]

DatasetName: TypeAlias = str | Path | hf_datasets.Dataset | Mapping[str, hf_datasets.Dataset]


@dataclass(frozen=True)
class DetectionSplits:
    """The two sets of a training run, with the same classes in the same order.

    Attributes:
        train ([`DetectionDataset`])
        eval ([`DetectionDataset`])
        train_name, eval_name (`str`): the splits' names in their source.
        unlabeled (`Records`, *optional*): further training images, without their labels.
    """

    train: DetectionDataset
    eval: DetectionDataset
    train_name: str
    eval_name: str
    unlabeled: Listed | None = None

    @property
    def all_train(self) -> DetectionDataset:
        """All training images, those without labels last."""
        return self.train if self.unlabeled is None else with_unlabeled(self.train, self.unlabeled)


def load_detection_splits(
    dataset_name: DatasetName,
    train_split: str | None = None,
    eval_split: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    skip_unreadable_images: bool = False,
    shapes_size: tuple[int, int] = (128, 128),
    unlabeled_name: DatasetName | None = None,
    labeled_fraction: float | None = None,
    annotations: Mapping[str, Path] | None = None,
    config_name: str | None = None,
) -> DetectionSplits:
    """Loads and checks the training and the evaluation split of a data set. Images are read later, one by one.

    Args:
        dataset_name (`str`, `Path`, `datasets.Dataset` or `dict[str, datasets.Dataset]`):
            - `"shapes"`: the generated set, with 2000 images in `train` and 300 each in `validation` and `test`;
            - a folder in one of the [`~hf_detrkd.data.layouts.LAYOUTS`]: COCO, KITTI, YOLO, Pascal VOC, rows of the
              `datasets` library, an imagefolder. Of KITTI the classes are Car, Pedestrian and Cyclist, regions of
              other types are ignored;
            - the id of a data set on the Hub;
            - a `datasets.DatasetDict` or `datasets.Dataset`; the latter is one split, `train` if it has no name.
        train_split (`str`, *optional*): by default the first of train, train2017 and training that exists. A data
            set with one split of another name, such as `default`, is split 8 : 2 at random.
        eval_split (`str`, *optional*): by default the first of validation, val, valid, val2017, dev and test that
            exists.
        max_train_samples (`int`, *optional*): number of images, from the first one. `shapes` generates exactly
            this many, even more than its default.
        max_eval_samples (`int`, *optional*): likewise.
        seed (`int`, *optional*, defaults to 0): of the generated set and of random splits only: runs with different
            training seeds use the same images. The augmentation has its own in [`DetectionDataset.with_transform`].
        skip_unreadable_images (`bool`, *optional*, defaults to `False`): decode every image once now, and drop and
            count those that fail or are missing. Every process does this by itself, with the same result.
        shapes_size (`tuple[int, int]`, *optional*, defaults to (128, 128)): (height, width) of the generated images.
        unlabeled_name (*optional*): further training images, whose labels are not read: like `dataset_name`, or a
            folder of images. Of a data set with splits it is `unlabeled` or else `train`.
        labeled_fraction (`float`, *optional*): share of the training images that keep their labels; the others become
            unlabelled. Which ones depends on `seed`.
        annotations (`dict[str, Path]`, *optional*): COCO JSON files of the splits `train` and `val`, whose images lie
            in the folder `dataset_name`.
        config_name (`str`, *optional*): configuration of a data set on the Hub that has several.

    Returns:
        [`DetectionSplits`]

    Raises:
        `DatasetError`: if the data set or a split is missing, cannot be used (see `checks.py`), or the two splits
            have no class in common.

    Example:
        ```python
        >>> splits = load_detection_splits("shapes", max_train_samples=100)
        >>> transform = DetectionTransform((128, 128), augmentation=AugmentationConfig.flip_only())
        >>> train = splits.train.with_transform(transform, seed=42)
        >>> evaluation = splits.eval.with_transform(DetectionTransform((128, 128)))
        ```
    """
    source = _open(dataset_name, seed, shapes_size, annotations, config_name)
    if _is_whole(source) and train_split is None and eval_split is None:
        source = _in_two(source, seed)
    train_split = train_split or first_split(source, TRAIN_SPLITS, "train")
    eval_split = eval_split or first_split(source, EVAL_SPLITS, "evaluate")
    train = load_split(source, train_split, max_train_samples, skip_unreadable_images)
    evaluation = load_split(source, eval_split, max_eval_samples, skip_unreadable_images)
    train, evaluation, table = with_common_classes(train, evaluation, (train_split, eval_split))
    if table is not None:
        logger.warning("The splits of %s have other category ids, and are joined by name:\n%s", source.name, table)
    unlabeled: list[Listed] = []
    if labeled_fraction is not None:
        train, rest = split_labels(train, labeled_fraction, seed)
        unlabeled.append(rest)
    if unlabeled_name is not None:
        unlabeled.append(_unlabeled(unlabeled_name, seed, shapes_size, skip_unreadable_images))
    further = JoinedRecords(*unlabeled) if len(unlabeled) > 1 else next(iter(unlabeled), None)
    return DetectionSplits(train, evaluation, train_split, eval_split, further)


def load_detection_split(
    dataset_name: DatasetName,
    split: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    skip_unreadable_images: bool = False,
    shapes_size: tuple[int, int] = (128, 128),
    annotations: Mapping[str, Path] | None = None,
    config_name: str | None = None,
) -> DetectionDataset:
    """Loads and checks one split; by default the one to evaluate on. See [`load_detection_splits`]."""
    source = _open(dataset_name, seed, shapes_size, annotations, config_name)
    return load_split(
        source, split or first_split(source, EVAL_SPLITS, "evaluate"), max_samples, skip_unreadable_images
    )


def split_names(dataset_name: DatasetName, config_name: str | None = None) -> list[str]:
    """The splits of a data set. See [`load_detection_splits`]."""
    return _open(dataset_name, 0, (128, 128), None, config_name).splits


def load_split(source: Source, split: str, max_samples: int | None, skip_unreadable_images: bool) -> DetectionDataset:
    """Loads a split of a source, and checks that it is not empty."""
    if split not in source.splits:
        raise DatasetError(f"{source.name} has no split {split!r}: choose one of {', '.join(source.splits)}.")
    if max_samples is not None and max_samples < 1:
        raise DatasetError(f"The number of images of the split {split!r} must be positive, got {max_samples}.")
    dataset = source.load(split, max_samples)
    if len(dataset) == 0:
        raise DatasetError(f"The split {split!r} of {source.name} has no images.")
    if skip_unreadable_images:
        dataset = dataset.select(find_readable_images(dataset.records, f"{source.name}, split {split}"))
    elif dataset.problems is not None:
        dataset.problems.raise_if_any()
    return dataset


def first_split(source: Source, names: Sequence[str], purpose: str) -> str:
    """The first of the names that a source has as a split."""
    for name in names:
        if name in source.splits:
            return name
    raise DatasetError(
        f"{source.name} has no split named {', '.join(names[:-1])} or {names[-1]} to {purpose} on: choose one of "
        f"{', '.join(source.splits)}."
    )


def _is_whole(source: Source) -> bool:
    """True for a source with one split whose name does not say what it is for."""
    return len(source.splits) == 1 and source.splits[0] not in (*TRAIN_SPLITS, *EVAL_SPLITS)


def _in_two(source: Source, seed: int) -> Source:
    """A source with one split as two, by a random choice that depends only on the seed."""
    (only,) = source.splits

    def load(split: str, most: int | None) -> DetectionDataset:
        whole = source.load(only, None)
        return whole.select(drawn(len(whole), split, seed)[:most])

    logger.warning("%s has only the split %s: a fifth of it, drawn at random, is `val`.", source.name, only)
    return Source(source.name, ["train", "val"], load)


def _unlabeled(name: DatasetName, seed: int, shapes_size: tuple[int, int], skip_unreadable_images: bool) -> Listed:
    """The images of a folder, or of a split of a data set."""
    folder = Path(name) if isinstance(name, str | Path) else None
    if folder is not None and folder.is_dir():
        source = source_of(folder, seed, labeled=False)
    else:
        source = _open(name, seed, shapes_size, labeled=False)
    if source is not None:
        split = next((one for one in ("unlabeled", *TRAIN_SPLITS) if one in source.splits), source.splits[0])
        return load_split(source, split, None, skip_unreadable_images).records
    records: Listed = image_files(cast(Path, folder))
    if skip_unreadable_images:
        records = SelectedRecords(records, find_readable_images(records, f"the unlabelled images of {name}"))
    return records


def _open(
    dataset_name: DatasetName,
    seed: int,
    shapes_size: tuple[int, int],
    annotations: Mapping[str, Path] | None = None,
    config_name: str | None = None,
    labeled: bool = True,
) -> Source:
    """The source for a name, determined without reading annotations; those of rows are optional if the labels are
    not wanted."""
    if isinstance(dataset_name, hf_datasets.Dataset):
        return rows_source({str(dataset_name.split or "train"): dataset_name}, "the given data set", labeled)
    if isinstance(dataset_name, Mapping):
        return rows_source(dataset_name, "the given data set", labeled)
    if not isinstance(dataset_name, str | Path):
        raise DatasetError(
            "A data set must be a name, a folder, a `datasets.Dataset` or a `DatasetDict`, got "
            f"{type(dataset_name).__name__}: streamed data sets cannot be indexed."
        )
    if dataset_name == "shapes":
        return _shapes(seed, shapes_size)
    place = Path(dataset_name).expanduser()
    if annotations:
        return coco_source(place, annotations)
    if place.exists():
        return find_source(place, seed)
    return rows_source(load_splits(str(dataset_name), config_name), str(dataset_name), labeled)


def _shapes(seed: int, image_size: tuple[int, int]) -> Source:
    def load(split: str, max_samples: int | None) -> DetectionDataset:
        records = ShapesRecords(max_samples or SHAPES_SIZES[split], seed, split, image_size)
        return DetectionDataset(records, SHAPE_CLASSES)

    return Source("shapes", list(SHAPES_SIZES), load)
