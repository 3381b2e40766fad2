"""Checks a run before it starts, without training, and says what it would do.

    python scripts/doctor.py --config scripts/recipes/quickstart.yaml

    hf-detrkd doctor --model_name_or_path PekingU/rtdetr_r18vd --dataset_name path/to/folder --output_dir outputs/s \
        --teacher_model_name_or_path path/to/teacher --method kd_detr --output_file found.json

It takes the arguments of distill.py, and three of its own: `--doctor_samples` images for the teacher's checks,
`--memory_limit_gb` in place of what the device has, and `--output_file` for a JSON of what was found.

Looked at: the environment; the splits, their classes and boxes; the pair of models, its classes, and whether the
method can serve it; whether the annotated boxes are in the frame of the images, whether the classes are in the
teacher's order, and whether another preprocessing suits the teacher far better (all three by its answers); one real
training step, its memory and time; every term of the loss; room on the disk. Each line begins with ok, warning or
problem; with a problem the exit status is 1.
"""

import dataclasses
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import distill
import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoImageProcessor, HfArgumentParser

import hf_detrkd
from hf_detrkd import DistillationConfig, DistillationTrainer, Teacher
from hf_detrkd.adapters import class_names
from hf_detrkd.data import DatasetError, DetectionSplits, DetectionTransform, parse_image_size
from hf_detrkd.data.datasets import EVAL_SPLITS
from hf_detrkd.diagnosis import (
    GIB,
    NORMALIZATIONS,
    PeakMemory,
    Seen,
    Statistics,
    View,
    better_frame,
    confusion,
    fitting_batch,
    look,
    map_of,
    memory_of,
    mended_boxes,
    offered_splits,
    reframed,
    renamed,
    with_renamed,
)
from hf_detrkd.efficiency import device_name
from hf_detrkd.hub import HubPush
from hf_detrkd.preparation import probe_terms
from hf_detrkd.teacher import NO_NORMALIZATION, Normalization, normalization_of


MOST_CLASSES_SHOWN = 30


@dataclass
class DoctorArguments:
    """The doctor's own arguments."""

    doctor_samples: int = field(default=32, metadata={"help": "Evaluation images for the teacher's checks."})
    memory_limit_gb: float | None = field(
        default=None, metadata={"help": "Memory of the device in GiB. Default: what it has."}
    )
    output_file: str | None = field(default=None, metadata={"help": "JSON file of what was found."})

    def __post_init__(self) -> None:
        if self.doctor_samples < 1:
            raise ValueError(f"--doctor_samples must be 1 or more, got {self.doctor_samples}.")


class Report:
    """Findings, printed as they come, and the figures behind them."""

    def __init__(self) -> None:
        self.findings: list[dict[str, str]] = []
        self.facts: dict[str, Any] = {}

    def add(self, status: str, subject: str, text: str) -> None:
        self.findings.append({"status": status, "subject": subject, "text": text})
        print(f"{status:8} {subject}: {text}".replace("\n", f"\n{'':9}"), flush=True)

    def ok(self, subject: str, text: str) -> None:
        self.add("ok", subject, text)

    def warning(self, subject: str, text: str) -> None:
        self.add("warning", subject, text)

    def problem(self, subject: str, text: str) -> None:
        self.add("problem", subject, text)

    def count(self, status: str) -> int:
        return sum(finding["status"] == status for finding in self.findings)


def main(argv: list[str]) -> int:
    """The exit status: 1 where there is a problem."""
    parser = HfArgumentParser(DoctorArguments, add_help=False, allow_abbrev=False)
    options, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if {"-h", "--help"} & set(rest):
        print(__doc__)
    report = Report()
    try:
        arguments = distill.parse(rest)
    except ValueError as error:
        report.problem("arguments", str(error))
    else:
        examine(report, arguments, options)
    problems, warnings = report.count("problem"), report.count("warning")
    print(f"{problems} problem{'s' * (problems != 1)} and {warnings} warning{'s' * (warnings != 1)}.")
    if options.output_file is not None:
        file = Path(options.output_file)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"findings": report.findings, "facts": report.facts}, indent=2) + "\n")
    return 1 if problems else 0


def examine(report: Report, arguments: distill.Arguments, options: DoctorArguments) -> None:
    """Everything in its order, as far as it can be looked at."""
    check_environment(report, arguments.config)
    if arguments.config.push_to_hub:
        try:
            HubPush.of(arguments.config).check()
            report.ok("Hub", "this run may write to its repository.")
        except ValueError as error:
            report.problem("Hub", str(error))
    splits = load_data(report, arguments)
    if splits is None:
        return
    with tempfile.TemporaryDirectory() as folder:  # a trainer makes its folder
        trainer = build_pair(report, arguments, splits, folder)
        if trainer is None:
            return
        if trainer.distiller.teacher is not None:
            check_teacher(report, trainer, splits, options.doctor_samples)
        fits = check_step(report, trainer, options.memory_limit_gb)
        if fits and trainer.args.methods and trainer.args.distillation_weight and trainer.args.probe:
            check_terms(report, trainer)
        check_disk(report, arguments.config, trainer)


# --- environment -----------------------------------------------------------------------------------------------------


def check_environment(report: Report, config: DistillationConfig) -> None:
    packages = {p.__name__: p.__version__ for p in (torch, transformers, accelerate, hf_detrkd)}
    versions = {"python": platform.python_version(), **packages}
    memory = memory_of(config.device)
    report.facts |= {"versions": versions, "device": device_name(config.device), "memory_gb": memory}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    report.ok("environment", f"{listed}; {device_name(config.device)}, {memory:.1f} GiB of memory to be had.")


def check_disk(report: Report, config: DistillationConfig, trainer: DistillationTrainer) -> None:
    """Room for the checkpoints: weights, and two moments of the optimizer for what is trained."""
    parameters = sum(p.numel() for p in trainer.distiller.parameters())
    trained = sum(p.numel() for p in trainer.distiller.parameters() if p.requires_grad)
    one, final = 4 * (parameters + 2 * trained) / GIB, 4 * parameters / GIB
    count = checkpoints_of(config, steps_of(trainer))
    needed = (count * one + final) * (2 if "control" in report.facts else 1)
    wanted = Path(config.output_dir).absolute()
    folder = next(place for place in (wanted, *wanted.parents) if place.exists())
    free = shutil.disk_usage(folder).free / GIB
    report.facts["disk"] = {"needed_gb": needed, "free_gb": free}
    kept = f"the student and {count} checkpoint{'s' * (count != 1)}" if count else "the student"
    text = f"about {needed:.2f} GiB are needed for {kept}, and {folder} has {free:.1f} GiB left"
    if needed > free:
        report.problem("disk", f"{text}: set --save_total_limit, or another --output_dir.")
    else:
        report.ok("disk", f"{text}.")


def checkpoints_of(config: DistillationConfig, steps: int) -> int:
    """How many checkpoints there will be at a time."""
    kind = str(config.save_strategy.value)
    every = {"no": 0, "best": 1, "epoch": math.ceil(config.num_train_epochs)}
    interval = config.save_steps if config.save_steps >= 1 else max(1, config.save_steps * steps)
    made = every.get(kind, math.ceil(steps / interval))
    return made if config.save_total_limit is None else min(made, config.save_total_limit + 1)


# --- data ------------------------------------------------------------------------------------------------------------


def load_data(report: Report, arguments: distill.Arguments) -> DetectionSplits | None:
    """The splits; where one is missing, those that were most likely meant."""
    with mended_boxes() as mended:
        try:
            splits = distill.load_splits(arguments)
        except DatasetError as error:
            splits = load_meant(report, arguments, error)
    if splits is None:
        return None
    for entry in mended:
        counts = f"of {entry.boxes} boxes of {entry.source}, {entry.dropped} without extent inside their image"
        if (fault := entry.fault()) is not None:
            report.problem("boxes", f"{fault}.")
        else:
            report.warning("boxes", f"{counts} are left out and {entry.clipped} that reach out of it clipped.")
    for name, split in (("train", splits.train), ("evaluation", splits.eval)):
        describe(report, name, Statistics.of(split, f"the {name} split"))
    return splits


def load_meant(report: Report, arguments: distill.Arguments, error: DatasetError) -> DetectionSplits | None:
    """Reports why a data set could not be read, and reads the splits that were meant."""
    script = arguments.script
    try:
        names, train, evaluation = offered_splits(
            script.dataset_name, script.dataset_train_split, script.dataset_eval_split
        )
    except DatasetError:  # there is no such data set
        report.problem("data set", str(error))
        return None
    asked = [script.dataset_eval_split] if script.dataset_eval_split else EVAL_SPLITS
    if script.dataset_train_split in names and set(asked) & set(names):  # something else is wrong
        report.problem("data set", str(error))
        return None
    if train is None or evaluation is None:
        report.problem("splits", f"{error} Training needs two splits, one to train on and one to evaluate on.")
        return None
    remedy = f"--dataset_train_split {train} --dataset_eval_split {evaluation}"
    report.problem("splits", f"{error} Pass {remedy}; the rest was looked at with these.")
    meant = dataclasses.replace(script, dataset_train_split=train, dataset_eval_split=evaluation)
    try:
        return distill.load_splits(dataclasses.replace(arguments, script=meant))
    except DatasetError as other:
        report.problem("data set", str(other))
        return None


def describe(report: Report, name: str, found: Statistics) -> None:
    """What is annotated in a split, and what is odd about it."""
    report.facts[name] = dataclasses.asdict(found)
    low, middle, high = found.sides
    shown = ", ".join(f"{c} {n}" for c, n in list(found.classes.items())[:MOST_CLASSES_SHOWN])
    more = f" and {len(found.classes) - MOST_CLASSES_SHOWN} more" if len(found.classes) > MOST_CLASSES_SHOWN else ""
    text = (
        f"{found.images} images ({found.empty} without a box), {found.boxes} boxes, median {found.per_image[0]:g} and "
        f"at most {found.per_image[1]} an image, {found.crowds} crowd regions; sides of {low:.0f} / {middle:.0f} / "
        f"{high:.0f} pixels (10 %, median, 90 %).\nClasses: {shown}{more}."
    )
    fault = found.fault()
    if fault is not None:
        report.problem(name, f"{fault}.\n{text}")
    elif found.boxes == 0:
        report.problem(name, f"no image has a box.\n{text}")
    else:
        report.ok(name, text)
    lacking = [c for c, n in found.classes.items() if n == 0]
    if lacking and found.boxes:
        report.warning(name, f"{len(lacking)} classes have no box: {', '.join(lacking[:10])}.")
    if found.boxes >= 50 and fault is None and 0 < min(found.reach) < 0.8:
        report.warning(
            name,
            f"no box reaches beyond {100 * found.reach[0]:.0f} % of an image's width and {100 * found.reach[1]:.0f} % "
            "of its height: are the annotations of smaller images?",
        )


# --- the pair --------------------------------------------------------------------------------------------------------


def build_pair(
    report: Report, arguments: distill.Arguments, splits: DetectionSplits, folder: str
) -> DistillationTrainer | None:
    """The run's trainer, that leaves nothing behind; `None` where it refuses the pair."""
    config = dataclasses.replace(
        arguments.config, output_dir=folder, push_to_hub=False, report_to="none", resume_from_checkpoint=None
    )
    try:
        trainer = distill.build_trainer(arguments, splits, config)
    except (ValueError, OSError) as error:
        report.problem("models", str(error))
        return None
    student, teacher = trainer.student, trainer.distiller.teacher
    queries = trainer.distiller.adapter.spec.num_queries
    report.ok("student", f"{model_in_words(student)}, {queries} queries; images {view_in_words(run_view(trainer))}.")
    most = max(report.facts[name]["per_image"][1] for name in ("train", "evaluation"))
    if most > queries:
        report.warning("student", f"an image has {most} boxes, and the student can find {queries}.")
    if arguments.script.run_control:
        report.facts["control"] = True
    if teacher is not None:
        table = teacher.class_map.table()
        words = f"{model_in_words(teacher.model)}; images {view_in_words(teacher_view(trainer))}.\n{table}"
        report.add("ok" if teacher.class_map.is_complete else "warning", "teacher", words)
        report.ok("method", f"{config.method} can serve this pair.")
    return trainer


def model_in_words(model: Any) -> str:
    return f"{model.config.model_type}, {model.num_parameters():,} parameters, {model.config.num_labels} classes"


def run_view(trainer: DistillationTrainer) -> View:
    """How the student is shown images."""
    return View(dict(trainer.processing_class.size), normalization_of(trainer.processing_class))


def teacher_processor(trainer: DistillationTrainer) -> Any:
    name, revision = trainer.args.teacher_model_name_or_path, trainer.args.teacher_model_revision
    return AutoImageProcessor.from_pretrained(name, revision=revision)


def teacher_view(trainer: DistillationTrainer) -> View:
    """How the run shows the teacher images."""
    size = parse_image_size(trainer.args.teacher_image_size) or run_view(trainer).size
    return View(size, normalization_of(teacher_processor(trainer)))


def view_in_words(view: View) -> str:
    return f"{size_in_words(view.size)}, {normalization_in_words(view.normalization)}"


def size_in_words(size: Any) -> str:
    parsed = DetectionTransform(size).size
    if parsed.shortest_edge is None:
        return f"of {parsed.height}x{parsed.width} pixels"
    return f"with a shorter side of {parsed.shortest_edge} and a longer of at most {parsed.longest_edge} pixels"


def normalization_in_words(normalization: Normalization) -> str:
    plain = [list(map(float, part)) for part in normalization]
    known = (name for name, value in NORMALIZATIONS.items() if [list(part) for part in value] == plain)
    return next(known, f"mean {plain[0]} and standard deviation {plain[1]}")


# --- the teacher -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What a teacher saw through a view, and its mAP once its classes are put in order."""

    view: View
    seen: list[Seen]
    renamed: dict[int, int]
    map: float


def check_teacher(report: Report, trainer: DistillationTrainer, splits: DetectionSplits, samples: int) -> None:
    """Frame, preprocessing, class order and mAP, on images spread over the evaluation set."""
    teacher = trainer.distiller.teacher
    assert teacher is not None
    columns, classes = teacher.class_map.columns, splits.eval.classes
    count = min(samples, len(splits.eval))
    images = splits.eval.select(np.linspace(0, len(splits.eval) - 1, count).round().astype(int))
    names = class_names(teacher.model.config)
    alone = Teacher(teacher.model, names, teacher.dtype)  # its own classes, no normalisation
    views = candidate_views(trainer)
    shown = tqdm(views, desc="Asking the teacher", unit="view", leave=False)
    seen = [look(alone, images, view, trainer.args.eval_batch_size) for view in shown]
    mean = map_of(seen[0], columns, classes)
    report.facts["teacher"] = {"map": mean, "images": count}
    seen = check_frame(report, seen)
    looks = []
    for view, found in zip(views, seen, strict=True):
        other = renamed(confusion(found, len(classes), len(names)), columns)
        looks.append(Look(view, found, other, map_of(found, with_renamed(columns, other), classes)))
    best = check_preprocessing(report, looks)
    check_classes(report, best, columns, classes, names)
    least = trainer.args.min_teacher_map
    if math.isnan(mean):
        report.warning("teacher", f"{count} evaluation images show no class that it knows: nothing can be said of it.")
    elif mean < least:
        report.problem("teacher", f"its mAP is {mean:.3f} on {count} evaluation images, and {least:g} is asked.")
    else:
        report.ok("teacher", f"its mAP is {mean:.3f} on {count} evaluation images.")


def candidate_views(trainer: DistillationTrainer) -> list[View]:
    """The run's view of the teacher, and others: its own processor's size, and the usual normalisations."""
    given, own = teacher_view(trainer), dict(teacher_processor(trainer).size)
    same = DetectionTransform(own).size == DetectionTransform(given.size).size
    kinds = [[list(map(float, part)) for part in given.normalization]]
    normalizations = [given.normalization]
    for other in NORMALIZATIONS.values():
        if [list(part) for part in other] not in kinds:
            normalizations.append(other)
    return [View(size, kind) for size in ([given.size] if same else [given.size, own]) for kind in normalizations]


def check_frame(report: Report, seen: list[list[Seen]]) -> list[list[Seen]]:
    """Whether the annotated boxes are in the images' frame; what was seen, with the boxes where they belong."""
    found = better_frame(seen[0])
    if found is None:
        report.ok("frame", "nothing suggests that the annotated boxes are in another frame than the images.")
        return seen
    words, frame, now, then = found
    report.problem(
        "frame",
        f"{100 * now:.0f} % of the annotated boxes fit the teacher's as they are, and {100 * then:.0f} % when they "
        f"are read as {words}: write them as x, y, width, height in pixels of the image files.",
    )
    return [reframed(images, frame) for images in seen]


def check_preprocessing(report: Report, looks: list[Look]) -> Look:
    """Whether the teacher sees far better through another view; the look that is right."""
    given, best = looks[0], max(looks, key=lambda one: -1.0 if math.isnan(one.map) else one.map)
    report.facts["views"] = [{"view": view_in_words(one.view), "map": one.map} for one in looks]
    if math.isnan(given.map):  # the images show nothing that it knows
        return given
    if best.map < 0.1:
        report.warning("preprocessing", "the teacher finds next to nothing however images are shown.")
        return given
    if best.map < given.map + 0.05 or best.map < 1.1 * given.map:
        report.ok("preprocessing", f"nothing suits the teacher better than images {view_in_words(given.view)}.")
        return given
    text = (
        f"shown images {view_in_words(given.view)}, the teacher has a mAP of {given.map:.3f}, and {best.map:.3f} with "
        f"images {view_in_words(best.view)}: {remedy_for(given.view, best.view)}."
    )
    report.add("problem" if given.map < 0.6 * best.map else "warning", "preprocessing", text)
    return best


def remedy_for(given: View, best: View) -> str:
    """What makes a run show the teacher images as it should."""
    remedies = []
    size = DetectionTransform(best.size).size
    if size != DetectionTransform(given.size).size:
        fixed = f"pass --teacher_image_size {size.height}x{size.width}"
        remedies.append(fixed if size.shortest_edge is None else "pass --keep_aspect_ratio with that --image_size")
    if best.normalization is not given.normalization:
        mean, deviation = (list(part) for part in best.normalization)
        plain = best.normalization is NO_NORMALIZATION
        entries = (
            {"do_normalize": False} if plain else {"do_normalize": True, "image_mean": mean, "image_std": deviation}
        )
        remedies.append(f"set {json.dumps(entries)[1:-1]} in the teacher's preprocessor_config.json")
    return " and ".join(remedies)


def check_classes(report: Report, look: Look, columns: Any, classes: list[str], names: list[str]) -> None:
    """Whether the teacher calls the classes what the class map says."""
    if not look.renamed:
        report.ok("class order", "the teacher calls no class plainly otherwise than the class map says.")
        return
    counts = confusion(look.seen, len(classes), len(names))
    said = [
        f"{classes[i]} {names[other]!r} ({counts[i, other]} of {counts[i].sum()})" for i, other in look.renamed.items()
    ]
    fixed = with_renamed(columns, look.renamed)
    lines = [f"{classes[i]}: {'null' if c is None else names[c]}" for i, c in enumerate(fixed) if c != columns[i]]
    before = map_of(look.seen, columns, classes)
    wrong = [i for i in look.renamed if columns[i] is not None]
    report.add(
        "problem" if wrong else "warning",
        "class order",
        f"the teacher calls {', '.join(said)}; with these exchanged its mAP is {look.map:.3f} in place of "
        f"{before:.3f}: correct id2label in its config.json or the data set's categories, whichever is wrong, or pass "
        "--class_map with the lines\n" + "\n".join(lines),
    )


# --- one step --------------------------------------------------------------------------------------------------------


def check_step(report: Report, trainer: DistillationTrainer, limit: float | None) -> bool:
    """Trains single steps of growing batches up to the asked one; whether that one fits into the memory."""
    device, asked = trainer.args.device, trainer.args.per_device_train_batch_size
    limit = memory_of(device) if limit is None else limit
    trainer.distiller.to(device)
    trainer.create_optimizer()
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0  # the student stays as it is
    peaks: dict[int, float] = {}
    seconds: list[dict[str, float]] = []
    fits = True
    sizes = sorted({size for size in (2, asked // 4, asked // 2) if 1 < size < asked} | {asked})
    for size in tqdm(sizes, desc="Trying a step", leave=False):
        if max(peaks.values(), default=0.0) > limit or (len(peaks) > 1 and fitting_batch(peaks, limit) < size):
            fits = False  # not tried: an operating system may end a process without memory
            break
        try:
            with PeakMemory(device) as memory:
                seconds = [one_step(trainer, size) for _ in range(4 if size == asked else 2)][1:]
        except torch.OutOfMemoryError:
            fits = False
            break
        peaks[size] = memory.gib
    report.facts["memory"] = {"peak_gb": peaks, "limit_gb": limit}
    fits = fits and peaks[asked] <= limit
    say_memory(report, peaks, sizes, limit, fits)
    if asked in peaks:
        say_time(report, trainer, {k: statistics.median(s[k] for s in seconds) for k in ("read", "step")})
    return fits


def say_memory(report: Report, peaks: dict[int, float], sizes: list[int], limit: float, fits: bool) -> None:
    asked = sizes[-1]
    measured = ", ".join(f"{peak:.2f} GiB for a batch of {size}" for size, peak in peaks.items())
    most = fitting_batch(peaks, limit) if len(peaks) > 1 else 0
    text = f"a step needs {measured or f'too much with a batch of {sizes[0]}'}, of {limit:.2f} GiB"
    if not fits:
        would = f"about {most} would fit, with --gradient_accumulation_steps for the same whole"
        report.problem(
            "memory",
            f"{text}, and --per_device_train_batch_size {asked} does not fit: "
            f"{would if most else f'not even {sizes[0]} would'}; a smaller --image_size, --bf16 or a smaller teacher "
            "need less.",
        )
    elif peaks[asked] > 0.9 * limit:
        report.warning("memory", f"{text}: less than a tenth is left.")
    else:
        report.ok("memory", f"{text}{f'; {min(most, 4 * asked)} would fit too' if most > asked else ''}.")


def say_time(report: Report, trainer: DistillationTrainer, seconds: dict[str, float]) -> None:
    """How long the run will take, in one process, without evaluations."""
    workers, steps = trainer.args.dataloader_num_workers, steps_of(trainer)
    read, step = seconds["read"], seconds["step"]
    each = max(step, read / workers) if workers else step + read
    whole = each * steps * trainer.args.gradient_accumulation_steps
    report.facts["time"] = {"step_seconds": step, "read_seconds": read, "steps": steps, "seconds": whole}
    text = (
        f"about {in_words(whole)} for {steps} steps in one process, without evaluations: {step:.3f} s for a batch, "
        f"and {read:.3f} s to read it with {workers} workers"
    )
    control = "; the control comes on top" if "control" in report.facts else ""
    if read > step and workers * step < read:
        report.warning("time", f"{text}: more --dataloader_num_workers would help{control}.")
    else:
        report.ok("time", f"{text}{control}.")


def in_words(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"


def steps_of(trainer: DistillationTrainer) -> int:
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(len(trainer.train_dataset) / args.per_device_train_batch_size)
    return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)


def one_step(trainer: DistillationTrainer, size: int) -> dict[str, float]:
    """Seconds to read a batch of random training images and to train on it."""
    device, distiller = trainer.args.device, trainer.distiller.train()
    started = time.perf_counter()
    places = torch.randint(len(trainer.train_dataset), (size,)).tolist()
    batch = trainer.data_collator([trainer.train_dataset[place] for place in places])
    ready = time.perf_counter()
    trainer.optimizer.zero_grad()
    inputs = trainer._prepare_inputs(batch)
    with trainer.accelerator.autocast():
        loss = distiller(**inputs)["loss"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(distiller.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"read": ready - started, "step": time.perf_counter() - ready}


def check_terms(report: Report, trainer: DistillationTrainer) -> None:
    """Every term of the loss on a batch, as the run itself does it first."""
    trainer.optimizer.zero_grad(set_to_none=True)
    try:
        found = probe_terms(trainer)
    except ValueError as error:
        report.problem("terms", str(error))
        return
    names = ", ".join(f"{term.name} {term.weighted / found.task:.2g}" for term in found.terms)
    report.ok("terms", f"all are finite and reach the student; their shares of the task loss are {names}.")


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one process
    sys.exit(main(sys.argv[1:]))
