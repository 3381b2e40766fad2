"""Reads KITTI's 2D object layout: images `image_2/000000.png` (or .jpg) and text files `label_2/000000.txt`.

A line of a label file is one object in 15 fields, 16 with the score of a result file: type, truncated, occluded,
alpha, left, top, right, bottom (pixels), and seven that only 3D detection needs (Geiger et al., CVPR 2012, and the
readme of the object development kit). The classes are cars, pedestrians and cyclists. A region of any other type,
including `DontCare`, is ignored: it becomes one crowd box of each class, which is not used in training and in which
the evaluator counts no detection as false.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from .checks import Problems, RawAnnotations, check_annotations, repeated
from .detection import DetectionDataset
from .images import read_image, read_size
from .records import TableRecords


KITTI_CLASSES = ["Car", "Pedestrian", "Cyclist"]

_IGNORED = ["Van", "Truck", "Person_sitting", "Tram", "Misc", "DontCare"]
_SPLITS = ["train", "val"]
_VAL_SHARE = 0.2


def kitti_splits(folder: Path) -> list[str]:
    """Names of the splits: those of train and val that `ImageSets` lists, else both; empty for other layouts."""
    if not _has_layout(_root(folder)):
        return []
    return [split for split in _SPLITS if _list(folder, split).is_file()] or list(_SPLITS)


def load_kitti(folder: Path, split: str, max_samples: int | None = None, seed: int = 0) -> DetectionDataset:
    """Loads and checks one split of a KITTI folder.

    `ImageSets/<split>.txt` in the folder lists the names of its images. Without such lists, a fifth of all images,
    drawn with a seed, is `val` and the rest `train`; both stay in the order of the names. `image_id` is the number
    in the image's name if all names in the folder are numbers, else its position among all images. Blank lines of
    label files are ignored.

    Args:
        folder (`Path`): holds `image_2` and `label_2`, or a folder `training` that does.
        split (`str`): `"train"` or `"val"`.
        max_samples (`int`, *optional*): number of images, from the first one; only these are checked.
        seed (`int`, *optional*, defaults to 0): seed of the random split into `train` and `val`.

    Raises:
        `DatasetError`: for every malformed line and missing file, at once.
    """
    root = _root(folder)
    problems = Problems(f"{root}, split {split}")
    images = _by_name(root / "image_2", (".png", ".jpg"), problems)
    labels = _by_name(root / "label_2", (".txt",), problems)
    ids = _image_ids(sorted(images.keys() | labels.keys()))
    list_of_split = _list(folder, split)
    names = _listed(list_of_split) if list_of_split.is_file() else _drawn(list(ids), split, seed)
    names = _complete(names[:max_samples], images, labels, problems)
    image_ids = [ids[name] for name in names]
    problems.add(repeated(image_ids), lambda i: f"the image {names[i]} repeats the image id {image_ids[i]}")
    files = [str(images[name]) for name in names]
    sizes = np.array([read_size(file) for file in files], dtype=np.int64).reshape(-1, 2)
    raw = _annotations([labels[name] for name in names], problems)
    table = check_annotations(raw, sizes, {i: i for i in range(len(KITTI_CLASSES))}, problems)
    records = TableRecords(np.array(image_ids, dtype=np.int64), files.__getitem__, sizes, partial(_read, files), table)
    return DetectionDataset(records, KITTI_CLASSES, repaired=table.repaired)


def _root(folder: Path) -> Path:
    """The root of the layout: KITTI's archives unpack into `training`."""
    return folder if _has_layout(folder) else folder / "training"


def _has_layout(folder: Path) -> bool:
    return (folder / "image_2").is_dir() or (folder / "label_2").is_dir()


def _list(folder: Path, split: str) -> Path:
    return folder / "ImageSets" / f"{split}.txt"


def _by_name(folder: Path, suffixes: Sequence[str], problems: Problems) -> dict[str, Path]:
    """The files of a folder by their names without suffix; two of one name are a problem."""
    files = sorted(path for path in folder.glob("*") if path.suffix in suffixes)
    names = [path.stem for path in files]
    problems.add(repeated(names), lambda i: f"{folder.name} contains both {files[i].name} and {files[i - 1].name}")
    return dict(zip(names, files, strict=True))


def _image_ids(names: list[str]) -> dict[str, int]:
    """Numbers that fit 64 bits, else positions."""
    numbered = all(name.isdecimal() and len(name) < 19 for name in names)
    return {name: int(name) if numbered else position for position, name in enumerate(names)}


def _listed(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _drawn(names: list[str], split: str, seed: int) -> list[str]:
    """The images of one side of the random split, which depends only on the names and the seed."""
    order = np.random.default_rng(seed).permutation(len(names))
    num_val = round(_VAL_SHARE * len(names))
    chosen = order[:num_val] if split == "val" else order[num_val:]
    return [names[i] for i in sorted(chosen)]


def _complete(
    names: list[str], images: Mapping[str, Path], labels: Mapping[str, Path], problems: Problems
) -> list[str]:
    """The names that have both files; a missing file is a problem."""
    no_image = [i for i, name in enumerate(names) if name not in images]
    problems.add(no_image, lambda i: f"the image file image_2/{names[i]}.png (or .jpg) does not exist")
    no_label = [i for i, name in enumerate(names) if name not in labels]
    problems.add(no_label, lambda i: f"the label file label_2/{names[i]}.txt does not exist")
    return [name for name in names if name in images and name in labels]


def _annotations(files: list[Path], problems: Problems) -> RawAnnotations:
    """The columns of all annotations, one label file per image; a malformed line is a problem."""
    places: list[str] = []
    malformed: list[str] = []
    raw = RawAnnotations([], [], [], [], [], describe=places.__getitem__)
    for image_index, file in enumerate(files):
        for place, line in _lines(file):
            try:
                kind, box = _parse(line.split())
            except ValueError as error:
                malformed.append(f"{place}: {error}")
                continue
            crowd = kind in _IGNORED
            for category in range(len(KITTI_CLASSES)) if crowd else [KITTI_CLASSES.index(kind)]:
                raw.image_index.append(image_index)
                raw.boxes.append(box)
                raw.categories.append(category)
                raw.areas.append(None)
                raw.crowds.append(int(crowd))
                places.append(place)
    problems.add(range(len(malformed)), malformed.__getitem__)
    return raw


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """All lines that are not blank, each after its name in messages."""
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if line.strip():
            yield f"{file.parent.name}/{file.name}, line {number}", line


def _parse(fields: list[str]) -> tuple[str, list[float]]:
    """Type and box (x, y, width, height) of a line; a `ValueError` says what is wrong with it."""
    if len(fields) not in (15, 16):
        raise ValueError(f"an object must have 15 fields, or 16 with a score, got {len(fields)}")
    if fields[0] not in KITTI_CLASSES + _IGNORED:
        raise ValueError(f"the type {fields[0]!r} is not one of {', '.join(KITTI_CLASSES + _IGNORED)}")
    left, top, right, bottom = map(_coordinate, fields[4:8])
    return fields[0], [left, top, right - left, bottom - top]


def _coordinate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"the box coordinate {text!r} is not a finite number")
    return value


def _read(files: list[str], index: int) -> Image.Image:
    return read_image(files[index], files[index])
