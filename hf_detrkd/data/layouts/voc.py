"""A folder in Pascal VOC's layout: XML files with `object` entries of a `name` and a `bndbox` in pixels.

`Annotations/` and `JPEGImages/` hold the files, and `ImageSets/Main/<split>.txt` lists the names of each split; or
each split is a folder with XML files beside the images. The classes are all names of the folder, sorted. An object
marked `difficult` is ignored: it becomes a crowd box.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from ..checks import Problems, RawAnnotations
from ..detection import DetectionDataset
from ..images import IMAGES
from ..text import IS_POINTER, is_lfs_pointer, read_lines
from .source import Source, by_stem, dataset_of_files, drawn, sizes_of, subfolders


SPLITS = ("train", "val", "trainval", "test")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass
class Annotated:
    """What an XML file says: objects as (name, box, difficult), and faults."""

    objects: list[tuple[str, list[float], bool]] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    faults: list[str] = field(default_factory=list)


def find_voc(folder: Path, seed: int) -> Source | None:
    """The splits of a folder in this layout; `None` for another one."""
    if (folder / "Annotations").is_dir() and any((folder / "Annotations").glob("*.xml")):
        xml, images = _files(folder / "Annotations", (".xml",)), _files(folder / "JPEGImages", IMAGES)
        lists = {name: folder / "ImageSets" / "Main" / f"{name}.txt" for name in SPLITS}
        listed = {name: _listed(file) for name, file in lists.items() if file.is_file()}
        return _source(folder, xml, images, listed, seed)
    parts = [one for one in (folder, *subfolders(folder)) if any(one.glob("*.xml"))]
    if not parts:
        return None
    xml = [file for one in parts for file in _files(one, (".xml",))]
    if parts == [folder]:
        return _source(folder, xml, _files(folder, IMAGES), {}, seed)
    everything = {path: _read_xml(path) for path in xml}
    classes = _classes(everything.values())

    def load(split: str, most: int | None) -> DetectionDataset:
        problems = Problems(f"{folder}, split {split}")
        files = by_stem(_files(folder / split, (".xml",)), problems)
        images = by_stem(_files(folder / split, IMAGES), problems)
        return _dataset(sorted(files)[:most], files, images, everything, classes, problems)

    return Source(str(folder), [one.name for one in parts if one != folder], load)


def _source(folder: Path, xml: list[Path], images: list[Path], listed: dict[str, list[str]], seed: int) -> Source:
    """The splits of XML files and images in two folders, by lists of names, else drawn at random."""
    everything = {path: _read_xml(path) for path in xml}
    classes = _classes(everything.values())
    names = sorted(path.stem for path in xml)
    splits = listed or {name: [names[i] for i in drawn(len(names), name, seed)] for name in ("train", "val")}

    def load(split: str, most: int | None) -> DetectionDataset:
        problems = Problems(f"{folder}, split {split}")
        files, pictures = by_stem(xml, problems), by_stem(images, problems)
        return _dataset(splits[split][:most], files, pictures, everything, classes, problems)

    return Source(str(folder), list(splits), load)


def _listed(file: Path) -> list[str]:
    """The names in a list, each once; words after them say something else."""
    return list(dict.fromkeys(line.split()[0] for line in read_lines(file)))


def _files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in suffixes)


def _classes(files: Iterable[Annotated]) -> list[str]:
    return sorted({name for one in files for name, _, _ in one.objects})


def _dataset(
    names: Sequence[str],
    xml: dict[str, Path],
    images: dict[str, Path],
    everything: dict[Path, Annotated],
    classes: list[str],
    problems: Problems,
) -> DetectionDataset:
    """The data set of the images with these names."""
    no_xml = [i for i, name in enumerate(names) if name not in xml]
    problems.add(no_xml, lambda i: f"the annotation file {names[i]}.xml does not exist")
    no_image = [i for i, name in enumerate(names) if name not in images]
    problems.add_missing(
        no_image, lambda i: f"there is no image {names[i]}, with any of the suffixes {', '.join(sorted(IMAGES))}"
    )
    kept = [name for name in names if name in xml]
    read = [everything[xml[name]] for name in kept]
    faults = [fault for one in read for fault in one.faults]
    problems.add(range(len(faults)), faults.__getitem__)
    files = [str(images.get(name, xml[name].with_suffix(".jpg"))) for name in kept]
    sizes = np.array([one.size for one in read], dtype=np.int64).reshape(-1, 2)
    sizes = np.where((sizes > 0).all(1, keepdims=True), sizes, sizes_of(files))
    places: list[str] = []
    raw = RawAnnotations([], [], [], [], [], describe=places.__getitem__)
    for index, (name, one) in enumerate(zip(kept, read, strict=True)):
        for number, (label, box, difficult) in enumerate(one.objects, start=1):
            raw.image_index.append(index)
            raw.boxes.append(box)
            raw.categories.append(classes.index(label))
            raw.areas.append(None)
            raw.crowds.append(int(difficult))
            places.append(f"{name}.xml, object {number}")
    return dataset_of_files(files, range(len(files)), sizes, raw, classes, problems)


def _read_xml(path: Path) -> Annotated:
    """The objects of a file; what is wrong with it is kept for the split that it belongs to."""
    found = Annotated()
    content = path.read_bytes()
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        found.faults.append(f"{path.name} {IS_POINTER if is_lfs_pointer(content) else f'is not XML ({error})'}")
        return found
    if root.tag != "annotation":
        found.faults.append(f"{path.name} is not Pascal VOC: its root is {root.tag!r:.60}, not 'annotation'")
        return found
    side = partial(_whole, root.find("size"))
    found.size = (side("width"), side("height"))
    for number, one in enumerate(root.iter("object"), start=1):
        name, box = (one.findtext("name") or "").strip(), one.find("bndbox")
        try:
            if not name:
                raise ValueError("has no name")
            left, top, right, bottom = (_coordinate(box, corner) for corner in CORNERS)
        except ValueError as error:
            found.faults.append(f"object {number} of {path.name} {error}")
            continue
        difficult = (one.findtext("difficult") or "0").strip() == "1"
        found.objects.append((name, [left, top, right - left, bottom - top], difficult))
    return found


def _whole(size: ElementTree.Element | None, side: str) -> int:
    """A side of the image in pixels; 0 for none that an image can have: then the file is asked."""
    text = "" if size is None else (size.findtext(side) or "").strip()
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def _coordinate(box: ElementTree.Element | None, name: str) -> float:
    text = None if box is None else box.findtext(name)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"has the {name} {text!r}, which must be a number")
    return value
