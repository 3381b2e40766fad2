"""Reads KITTI's 2D object layout: images `image_2/000000.png` (or .jpg) and text files `label_2/000000.txt`.

A line of a label file is one object in 15 fields, 16 with the score of a result file: type, truncated, occluded,
alpha, left, top, right, bottom (pixels), and seven that only 3D detection needs (Geiger et al., CVPR 2012, and the
readme of the object development kit). The classes are cars, pedestrians and cyclists. A region of any other type,
including `DontCare`, is ignored: it becomes one crowd box of each class, which is not used in training and in which
the evaluator counts no detection as false.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..checks import Problems, RawAnnotations, repeated
from ..detection import DetectionDataset
from ..text import read_lines
from .source import Source, by_stem, dataset_of_files, drawn, finite, numbered_lines, sizes_of


KITTI_CLASSES = ["Car", "Pedestrian", "Cyclist"]

_IGNORED = ["Van", "Truck", "Person_sitting", "Tram", "Misc", "DontCare"]
_SPLITS = ["train", "val"]


def find_kitti(folder: Path, seed: int) -> Source | None:
    """The splits of a folder in this layout; `None` for another one."""
    splits = kitti_splits(folder)
    if not splits:
        return None
    return Source(str(folder), splits, lambda split, most: load_kitti(folder, split, most, seed))


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
    images = by_stem([f for f in (root / "image_2").glob("*") if f.suffix in (".png", ".jpg")], problems)
    labels = by_stem(list((root / "label_2").glob("*.txt")), problems)
    ids = _image_ids(sorted(images.keys() | labels.keys()))
    list_of_split = _list(folder, split)
    if list_of_split.is_file():
        names = read_lines(list_of_split)
    else:
        names = [list(ids)[place] for place in drawn(len(ids), split, seed)]
    names = _complete(names[:max_samples], images, labels, problems)
    image_ids = [ids[name] for name in names]
    problems.add(repeated(image_ids), lambda i: f"the image {names[i]} repeats the image id {image_ids[i]}")
    files = [str(images.get(name, root / "image_2" / f"{name}.png")) for name in names]
    raw = _annotations([labels[name] for name in names], problems)
    return dataset_of_files(files, image_ids, sizes_of(files), raw, KITTI_CLASSES, problems)


def _root(folder: Path) -> Path:
    """The root of the layout: KITTI's archives unpack into `training`."""
    return folder if _has_layout(folder) else folder / "training"


def _has_layout(folder: Path) -> bool:
    return (folder / "image_2").is_dir() or (folder / "label_2").is_dir()


def _list(folder: Path, split: str) -> Path:
    return folder / "ImageSets" / f"{split}.txt"


def _image_ids(names: list[str]) -> dict[str, int]:
    """Numbers that fit 64 bits, else positions."""
    numbered = all(name.isdecimal() and len(name) < 19 for name in names)
    return {name: int(name) if numbered else position for position, name in enumerate(names)}


def _complete(
    names: list[str], images: Mapping[str, Path], labels: Mapping[str, Path], problems: Problems
) -> list[str]:
    """The names that have a label file; a missing file is a problem."""
    no_image = [i for i, name in enumerate(names) if name not in images]
    problems.add_missing(no_image, lambda i: f"the image file image_2/{names[i]}.png (or .jpg) does not exist")
    no_label = [i for i, name in enumerate(names) if name not in labels]
    problems.add(no_label, lambda i: f"the label file label_2/{names[i]}.txt does not exist")
    return [name for name in names if name in labels]


def _annotations(files: list[Path], problems: Problems) -> RawAnnotations:
    """The columns of all annotations, one label file per image; a malformed line is a problem."""
    places: list[str] = []
    malformed: list[str] = []
    raw = RawAnnotations([], [], [], [], [], describe=places.__getitem__)
    for image_index, file in enumerate(files):
        for place, line in numbered_lines(file, malformed):
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


def _parse(fields: list[str]) -> tuple[str, list[float]]:
    """Type and box (x, y, width, height) of a line; a `ValueError` says what is wrong with it."""
    if len(fields) not in (15, 16):
        raise ValueError(f"an object must have 15 fields, or 16 with a score, got {len(fields)}")
    if fields[0] not in KITTI_CLASSES + _IGNORED:
        raise ValueError(f"the type {fields[0]!r} is not one of {', '.join(KITTI_CLASSES + _IGNORED)}")
    left, top, right, bottom = (finite(field, "box coordinate") for field in fields[4:8])
    return fields[0], [left, top, right - left, bottom - top]
