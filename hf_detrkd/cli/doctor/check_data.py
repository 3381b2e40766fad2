"""The doctor's checks of a data set: its splits, their boxes and classes."""

import dataclasses
from typing import cast

from ...data import DatasetError, DetectionSplits
from ...data.datasets import EVAL_SPLITS, TRAIN_SPLITS
from ...data.faults import CheckImages, check_images, nothing_to_learn, repair_fault
from ...data.records import RepairedBoxes
from ..arguments import NO_DATA, Arguments
from ..run_setup import load_splits
from . import Statistics, offered_splits
from .findings import Report


MOST_CLASSES_SHOWN = 30


def load_data(report: Report, arguments: Arguments) -> DetectionSplits | None:
    """Loads the splits; if one is missing, those that were most likely meant."""
    splits: DetectionSplits | None
    if arguments.script.dataset_name is None:
        report.problem("data set", NO_DATA)
        return None
    try:
        splits = load_splits(arguments)
    except DatasetError as error:
        splits = load_meant(report, arguments, error)
    if splits is None:
        return None
    for split in (splits.train, splits.eval):
        if split.repaired:
            say_repaired(report, split.repaired)
    for name, split in (("train", splits.train), ("evaluation", splits.eval)):
        describe(report, name, Statistics.of(split, f"the {name} split"))
    nothing = nothing_to_learn(splits.train)
    if nothing is not None:
        report.problem("train", f"there is nothing to train on: {nothing}.")
    return splits if images_are_sound(report, splits, arguments) else None


def images_are_sound(report: Report, splits: DetectionSplits, arguments: Arguments) -> bool:
    """Reads images of both splits, and reports those that cannot be used."""
    sound = True
    for name, split in (("train", splits.train), ("evaluation", splits.eval)):
        try:
            check_images(split, f"the {name} images", cast(CheckImages, arguments.script.check_images))
        except DatasetError as error:
            report.problem("images", str(error))
            sound = False
    return sound


def load_meant(report: Report, arguments: Arguments, error: DatasetError) -> DetectionSplits | None:
    """Reports why a data set could not be loaded, and loads the splits that were most likely meant."""
    script = arguments.script
    train, evaluation = script.dataset_train_split, script.dataset_eval_split
    try:
        names, near_train, near_evaluation = offered_splits(
            cast(str, script.dataset_name), train, evaluation, script.dataset_config_name
        )
    except DatasetError:  # there is no such data set
        report.problem("data set", str(error))
        return None
    wanted = [train] if train else TRAIN_SPLITS
    asked = [evaluation] if evaluation else EVAL_SPLITS
    if set(wanted) & set(names) and set(asked) & set(names):  # the error has another cause
        report.problem("data set", str(error))
        return None
    if near_train is None or near_evaluation is None:
        report.problem("splits", f"{error} Training needs two splits, one to train on and one to evaluate on.")
        return None
    remedy = f"--dataset_train_split {near_train} --dataset_eval_split {near_evaluation}"
    report.problem("splits", f"{error} Pass {remedy}; the remaining checks use these splits.")
    meant = dataclasses.replace(script, dataset_train_split=near_train, dataset_eval_split=near_evaluation)
    try:
        return load_splits(dataclasses.replace(arguments, script=meant))
    except DatasetError as other:
        report.problem("data set", str(other))
        return None


def say_repaired(report: Report, repaired: RepairedBoxes) -> None:
    """Reports dropped and clipped boxes: as a problem if most are affected, which suggests a wrong format."""
    fault = repair_fault(repaired)
    if fault is not None:
        report.problem("boxes", f"{fault}.")
        return
    report.warning(
        "boxes",
        f"{repaired.boxes} boxes of {repaired.source}: dropped {repaired.dropped} with no area inside the image, "
        f"clipped {repaired.clipped} to the image.",
    )


def describe(report: Report, name: str, found: Statistics) -> None:
    """Reports the statistics of a split, and anything unusual in them."""
    report.facts[name] = dataclasses.asdict(found)
    fault = found.fault() if found.boxes else "no image has a box"
    if fault is None:
        report.ok(name, in_words(found))
    else:
        report.problem(name, f"{fault}.\n{in_words(found)}")
    lacking = [c for c, n in found.classes.items() if n == 0]
    if lacking and found.boxes:
        report.warning(name, f"{len(lacking)} classes have no box: {', '.join(lacking[:10])}.")
    if found.boxes >= 50 and fault is None and 0 < min(found.reach) < 0.8:
        report.warning(
            name,
            f"no box extends beyond {100 * found.reach[0]:.0f} % of an image's width and {100 * found.reach[1]:.0f} % "
            "of its height: were smaller images annotated?",
        )


def in_words(found: Statistics) -> str:
    low, middle, high = found.sides
    shown = ", ".join(f"{c} {n}" for c, n in list(found.classes.items())[:MOST_CLASSES_SHOWN])
    more = f" and {len(found.classes) - MOST_CLASSES_SHOWN} more" if len(found.classes) > MOST_CLASSES_SHOWN else ""
    return (
        f"{found.images} images ({found.empty} without a box), {found.boxes} boxes, median {found.per_image[0]:g} and "
        f"at most {found.per_image[1]} per image, {found.crowds} crowd regions; sides of {low:.0f} / {middle:.0f} / "
        f"{high:.0f} pixels (10 %, median, 90 %).\nClasses: {shown}{more}."
    )
