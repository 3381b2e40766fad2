"""Loads a detection data set from any source: `dataset_name` is one argument for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import datasets as hf_datasets

from .checks import find_readable_images
from .coco import coco_splits, load_coco
from .detection import DetectionDataset
from .errors import DatasetError
from .kitti import kitti_splits, load_kitti
from .records import ImageRecord, Records, SelectedRecords
from .rows import load_row_images, load_rows
from .shapes import SHAPE_CLASSES, SHAPES_SIZES, ShapesRecords
from .unlabeled import JoinedRecords, image_files, split_labels, with_unlabeled


EVAL_SPLITS = ("validation", "val", "test")

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


@dataclass(frozen=True)
class _Source:
    """A source of splits: their names, and a function that loads at most a given number of images of one."""

    name: str
    splits: list[str]
    load: Callable[[str, int | None], DetectionDataset]


def load_detection_splits(
    dataset_name: DatasetName,
    train_split: str = "train",
    eval_split: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    skip_unreadable_images: bool = False,
    shapes_size: tuple[int, int] = (128, 128),
    unlabeled_name: DatasetName | None = None,
    labeled_fraction: float | None = None,
) -> DetectionSplits:
    """Loads and checks the training and the evaluation split of a data set. Images are read later, one by one.

    Args:
        dataset_name (`str`, `Path`, `datasets.Dataset` or `dict[str, datasets.Dataset]`):
            - `"shapes"`: the generated set, with 2000 images in `train` and 300 each in `validation` and `test`;
            - a folder in COCO layout (`annotations/instances_<split>.json`, `<split>/` images);
            - a folder in KITTI layout (`image_2/`, `label_2/` text files), or one with such a folder `training`. The
              classes are Car, Pedestrian and Cyclist, regions of other types are ignored. `train` and `val` are
              those of `ImageSets/<split>.txt`, or else a random 8 : 2 split;
            - a folder written by `save_to_disk`, or any other that `datasets.load_dataset` can read;
            - the id of a data set on the Hub;
            - a `datasets.DatasetDict` or `datasets.Dataset`; the latter is one split, `train` if it has no name.
        train_split (`str`, *optional*, defaults to `"train"`)
        eval_split (`str`, *optional*): by default the first of validation, val and test that exists.
        max_train_samples (`int`, *optional*): number of images, from the first one. `shapes` generates exactly
            this many, even more than its default.
        max_eval_samples (`int`, *optional*): likewise.
        seed (`int`, *optional*, defaults to 0): of the generated set and of KITTI's random splits only: runs with
            different training seeds use the same images. The augmentation has its own in
            [`DetectionDataset.with_transform`].
        skip_unreadable_images (`bool`, *optional*, defaults to `False`): decode every image once now, and drop and
            count those that fail. Every process does this by itself, with the same result.
        shapes_size (`tuple[int, int]`, *optional*, defaults to (128, 128)): (height, width) of the generated images.
        unlabeled_name (*optional*): further training images, whose labels are not read: like `dataset_name`, or a
            folder of images. Of a data set with splits it is `unlabeled` or else `train`.
        labeled_fraction (`float`, *optional*): share of the training images that keep their labels; the others become
            unlabelled. Which ones depends on `seed`.

    Returns:
        [`DetectionSplits`]

    Raises:
        `DatasetError`: if the data set or a split is missing, cannot be used (see `checks.py`), or the two splits
            differ in their classes.

    Example:
        ```python
        >>> splits = load_detection_splits("shapes", max_train_samples=100)
        >>> transform = DetectionTransform((128, 128), augmentation=AugmentationConfig.flip_only())
        >>> train = splits.train.with_transform(transform, seed=42)
        >>> evaluation = splits.eval.with_transform(DetectionTransform((128, 128)))
        ```
    """
    source = _open(dataset_name, seed, shapes_size)
    train = _load(source, train_split, max_train_samples, skip_unreadable_images)
    eval_split = eval_split or _default_eval_split(source)
    evaluation = _load(source, eval_split, max_eval_samples, skip_unreadable_images)
    if (train.classes, train.category_ids) != (evaluation.classes, evaluation.category_ids):
        pairs = [set(zip(split.category_ids, split.classes, strict=True)) for split in (train, evaluation)]
        raise DatasetError(
            f"The splits {train_split} and {eval_split} of {source.name} must have the same categories in the same "
            f"order, but differ in {sorted(pairs[0] ^ pairs[1])[:10] or 'their order'}: give both the same list."
        )
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
) -> DetectionDataset:
    """Loads and checks one split; by default the one to evaluate on. See [`load_detection_splits`]."""
    source = _open(dataset_name, seed, shapes_size)
    return _load(source, split or _default_eval_split(source), max_samples, skip_unreadable_images)


def split_names(dataset_name: DatasetName) -> list[str]:
    """The splits of a data set. See [`load_detection_splits`]."""
    return _open(dataset_name, 0, (128, 128)).splits


def _load(source: _Source, split: str, max_samples: int | None, skip_unreadable_images: bool) -> DetectionDataset:
    if split not in source.splits:
        raise DatasetError(f"{source.name} has no split {split!r}: choose one of {', '.join(source.splits)}.")
    if max_samples is not None and max_samples < 1:
        raise DatasetError(f"The number of images of the split {split!r} must be positive, got {max_samples}.")
    dataset = source.load(split, max_samples)
    if len(dataset) == 0:
        raise DatasetError(f"The split {split!r} of {source.name} has no images.")
    if skip_unreadable_images:
        dataset = dataset.select(find_readable_images(dataset.records, f"{source.name}, split {split}"))
    return dataset


def _unlabeled(name: DatasetName, seed: int, shapes_size: tuple[int, int], skip_unreadable_images: bool) -> Listed:
    """The images of a folder, or of a split of a data set."""
    folder = Path(name) if isinstance(name, str | Path) else None
    if folder is not None and folder.is_dir() and not _is_data_set(folder):
        records: Listed = image_files(folder)
    else:
        source = _open(name, seed, shapes_size, labeled=False)
        split = next((one for one in ("unlabeled", "train") if one in source.splits), source.splits[0])
        records = source.load(split, None).records
    if skip_unreadable_images:
        records = SelectedRecords(records, find_readable_images(records, f"the unlabelled images of {name}"))
    return records


def _is_data_set(folder: Path) -> bool:
    """True if a folder has a layout, and is not just one of images."""
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    rows = any(next(folder.rglob(f"*.{kind}"), None) for kind in ("parquet", "arrow"))
    return saved or rows or (folder / "annotations").is_dir() or bool(kitti_splits(folder))


def _default_eval_split(source: _Source) -> str:
    for name in EVAL_SPLITS:
        if name in source.splits:
            return name
    raise DatasetError(
        f"{source.name} has no split named {', '.join(EVAL_SPLITS[:-1])} or {EVAL_SPLITS[-1]} to evaluate on: choose "
        f"one of {', '.join(source.splits)}."
    )


def _open(dataset_name: DatasetName, seed: int, shapes_size: tuple[int, int], labeled: bool = True) -> _Source:
    """The source for a name, determined without reading annotations; those of rows are optional if the labels are
    not wanted."""
    if isinstance(dataset_name, hf_datasets.Dataset):
        return _rows({str(dataset_name.split or "train"): dataset_name}, "the given data set", labeled)
    if isinstance(dataset_name, Mapping):
        return _rows(dataset_name, "the given data set", labeled)
    if not isinstance(dataset_name, str | Path):
        raise DatasetError(
            "A data set must be a name, a folder, a `datasets.Dataset` or a `DatasetDict`, got "
            f"{type(dataset_name).__name__}: streamed data sets cannot be indexed."
        )
    if dataset_name == "shapes":
        return _shapes(seed, shapes_size)
    folder = Path(dataset_name)
    if (folder / "annotations").is_dir():
        return _coco(folder)
    if kitti_splits(folder):
        return _kitti(folder, seed)
    return _rows(_load_rows(str(dataset_name)), str(dataset_name), labeled)


def _shapes(seed: int, image_size: tuple[int, int]) -> _Source:
    def load(split: str, max_samples: int | None) -> DetectionDataset:
        records = ShapesRecords(max_samples or SHAPES_SIZES[split], seed, split, image_size)
        return DetectionDataset(records, SHAPE_CLASSES)

    return _Source("shapes", list(SHAPES_SIZES), load)


def _coco(folder: Path) -> _Source:
    splits = coco_splits(folder)
    if not splits:
        raise DatasetError(
            f"The folder {folder / 'annotations'} must contain instances_<split>.json files, but has none."
        )

    def load(split: str, max_samples: int | None) -> DetectionDataset:
        dataset = load_coco(folder, split)
        return dataset if max_samples is None else dataset.select(range(min(max_samples, len(dataset))))

    return _Source(str(folder), splits, load)


def _kitti(folder: Path, seed: int) -> _Source:
    def load(split: str, max_samples: int | None) -> DetectionDataset:
        return load_kitti(folder, split, max_samples, seed)

    return _Source(str(folder), kitti_splits(folder), load)


def _rows(splits: Mapping[str, hf_datasets.Dataset], name: str, labeled: bool) -> _Source:
    for split, rows in splits.items():
        if not isinstance(rows, hf_datasets.Dataset):
            raise DatasetError(
                f"The split {split} of {name} must be a `datasets.Dataset`, got {type(rows).__name__}: streamed data "
                "sets cannot be indexed."
            )

    def load(split: str, max_samples: int | None) -> DetectionDataset:
        rows = splits[split]
        rows = rows if max_samples is None else rows.select(range(min(max_samples, len(rows))))
        return (load_rows if labeled else load_row_images)(rows, f"{name}, split {split}")

    return _Source(name, list(splits), load)


def _load_rows(name: str) -> Mapping[str, hf_datasets.Dataset]:
    """All splits of a folder or of a Hub id."""
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded = hf_datasets.load_from_disk(name)
    else:
        try:
            loaded = hf_datasets.load_dataset(name)
        except (FileNotFoundError, ConnectionError) as error:
            raise DatasetError(
                f"No data set {name!r} was found locally or on the Hub ({error}): give `shapes`, a folder in COCO "
                "layout (annotations/instances_<split>.json) or KITTI layout (image_2, label_2), a folder written by "
                "`save_to_disk`, or a Hub id."
            ) from error
    return {str(loaded.split or "train"): loaded} if isinstance(loaded, hf_datasets.Dataset) else loaded
