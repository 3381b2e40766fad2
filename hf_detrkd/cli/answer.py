"""Stores the answers of a teacher, so that a training reads them instead of running the teacher.

    hf-detrkd answer --config recipe.yaml --teacher_answers outputs/answers

    hf-detrkd distill --config recipe.yaml --teacher_answers outputs/answers

It takes the arguments of distill.py: they say which images and views the teacher sees, and what the methods ask. Every
process writes files of its own. A stopped series goes on where it was if it is started again. With
--hub_answers_id the answers become a data set repository, and --teacher_answers takes its id. With --detections a file
of COCO results of any detector takes the place of a teacher.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from ..answers import AnswerWriter, Manifest, StoredAnswers
from ..answers.detections import detection_rows, detections_manifest, read_detections
from ..answers.reader import METRICS
from ..artifacts.hub.push_run import push_answers
from ..data import DetectionDataset, DetectionSplits, DetectionTransform, parse_image_size
from ..data.text import there
from ..distillation.answering import Answering, answer_shards
from ..distillation.teacher import Teacher
from ..training.config import DistillationConfig, listed
from ..training.preflight import check_teacher
from ..training.trainer import DistillationTrainer
from .arguments import Arguments, parse
from .launching import check_processes
from .run_setup import build_trainer, check_data, load_splits, make_student
from .screen import run


FILE_BYTES = 2**26  # of a file, which is in memory before it is written
ANSWERS = "answers"  # in the output folder, with --teacher_answers auto


def answer_if_auto(arguments: Arguments, splits: DetectionSplits) -> float:
    """With `--teacher_answers auto`, stores the answers of each teacher in the output folder, and sets the argument to
    their folders; returns the seconds of a row on this process, 0 if nothing was left to do."""
    config = arguments.config
    if config.teacher_answers != "auto":
        return 0.0
    names, maps = listed(config.teacher_model_name_or_path), listed(config.class_map)
    folder = Path(config.output_dir) / ANSWERS
    folders = [folder / str(number) for number in range(1, len(names) + 1)] if len(names) > 1 else [folder]
    seconds = 0.0
    for place, one in enumerate(folders):
        given = arguments
        if len(names) > 1:
            own = {"teacher_model_name_or_path": names[place], "class_map": maps[place] if maps else None}
            given = dataclasses.replace(arguments, config=dataclasses.replace(cast(Any, config), **own))
        try:
            StoredAnswers(one)  # of a run that is resumed; the trainer checks whether they fit
        except ValueError:
            seconds += answer(given, one, splits)
    config.teacher_answers = ",".join(map(str, folders))
    return seconds


def answer(arguments: Arguments, folder: Path, splits: DetectionSplits | None = None) -> float:
    """Stores the answers that a run needs in a folder, and the teacher's metrics on the evaluation set.

    Returns:
        `float`: seconds of a row on this process, 0 if nothing was left to do.

    Raises:
        ValueError: the run has no teacher, its answers cannot be stored, the folder holds others, or the disk is too
            small.
    """
    config = arguments.config
    if splits is None:
        splits = load_splits(arguments)
        check_data(arguments, splits)
    if arguments.script.detections is not None:
        store_detections(arguments, splits, folder)
        return 0.0
    with tempfile.TemporaryDirectory() as scratch:  # a trainer creates its output folder
        changes = {"teacher_answers": None, "output_dir": scratch, "report_to": "none", "push_to_hub": False}
        live = dataclasses.replace(cast(Any, config), **changes)
        trainer = build_trainer(arguments, splits, live)
        teacher, dataset = trainer.distiller.teacher, trainer.train_dataset
        if config.answers_form == "moved":
            seen = parse_image_size(config.teacher_image_size)
            plain = DetectionTransform.for_processor(trainer.processing_class, teacher_size=seen)
            dataset = splits.all_train.with_transform(plain, views=1)
        if not isinstance(teacher, Teacher):
            raise ValueError("Answers are those of a teacher: set --method and --teacher_model_name_or_path.")
        evaluate(trainer, teacher, folder)
        return store(trainer, teacher, cast(DetectionDataset, dataset), folder, names_of(arguments, splits))


def names_of(arguments: Arguments, splits: DetectionSplits) -> dict[str, Any]:
    """What the manifest says of the data set."""
    name = str(arguments.script.dataset_name)
    local = there(name)
    return {
        "name": Path(name).name if local else name,
        "split": splits.train_name,
        "teacher_image_size": arguments.config.teacher_image_size,
    }


def store(
    trainer: DistillationTrainer, teacher: Teacher, dataset: DetectionDataset, folder: Path, names: dict[str, Any]
) -> float:
    """Writes the files of this process, after all that is known before has been printed; returns seconds per row."""
    config, state = trainer.args, PartialState()
    padded = dataset.transform is not None and dataset.transform.pads
    methods: list[Any] = list(trainer.distiller.methods.values())
    moved = config.answers_form == "moved"
    threshold = None if dataset.labeled().all() else config.pseudo_threshold
    answering = Answering(teacher, methods, config.augmentation_seed, padded, moved, threshold)
    first = trainer._prepare_inputs(trainer.data_collator([dataset.view_of(0, 0)]))
    manifest = answering.manifest(dataset, first, names, config.answers_dtype, 1).with_files_of(FILE_BYTES)
    writer = AnswerWriter(folder, manifest)
    state.wait_for_everyone()  # before the manifest is written, which all have looked for
    missing: list[Any] = [None]
    if state.is_main_process:
        print(size_in_words(manifest, folder), flush=True)
        writer.begin()
        missing = [writer.missing()]
    broadcast_object_list(missing)
    mine = missing[0][state.process_index :: state.num_processes]
    total = sum(len(manifest.places(number)) for number in mine)
    done = answer_shards(
        answering,
        dataset,
        writer,
        mine,
        config.per_device_eval_batch_size,
        trainer.data_collator,
        config.device,
        config.dataloader_num_workers,
    )
    hidden = config.disable_tqdm or not state.is_main_process
    started = time.perf_counter()
    with tqdm(total=total, desc="Answering", unit="image", disable=hidden) as bar:
        for rows in done:
            bar.update(rows)
    seconds = time.perf_counter() - started
    if state.is_main_process and total:
        print(f"Answered {total} of {manifest.rows} rows in {seconds:.1f} s, {total / seconds:.1f} a second.")
    state.wait_for_everyone()
    return seconds / total if total else 0.0


def store_detections(arguments: Arguments, splits: DetectionSplits, folder: Path) -> None:
    """Writes the detections of a file as answers that move with the augmentation."""
    script, names = arguments.script, names_of(arguments, splits)
    _, processor = make_student(script, splits.train.classes, arguments.config)
    dataset = splits.all_train.with_transform(DetectionTransform.for_processor(processor), views=1)
    file = Path(str(script.detections)).expanduser()
    found = read_detections(file, dataset.category_ids)
    manifest = detections_manifest(file, dataset, names, 1).with_files_of(FILE_BYTES)
    if PartialState().is_main_process:
        writer = AnswerWriter(folder, manifest)
        print(size_in_words(manifest, folder), flush=True)
        writer.begin()
        for number in writer.missing():
            writer.write(number, detection_rows(found, dataset, manifest.places(number)))
        seen = sum(record.image_id in found for record in dataset.records)
        print(f"{seen} of {len(dataset)} images have detections.")
    PartialState().wait_for_everyone()


def size_in_words(manifest: Manifest, folder: Path) -> str:
    """The size of a row and of all of them.

    Raises:
        ValueError: the disk has less room.
    """
    whole = manifest.bytes_per_row * manifest.rows
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in folder.glob("answers-*.arrow"))
    free = shutil.disk_usage(folder).free
    text = (
        f"{manifest.rows:,} rows ({manifest.dataset['images']:,} images, {manifest.views} views) of "
        f"{manifest.bytes_per_row / 1e3:,.1f} kB: {whole / 1e9:,.3f} GB in {manifest.shards} files."
    )
    if whole - there > free:
        raise ValueError(
            f"The disk of {folder} is too small for the answers, {free / 1e9:,.1f} GB are free: {text} Take fewer "
            "--augmentation_views, --answers_dtype float16, or a method without feature terms."
        )
    return text


def evaluate(trainer: DistillationTrainer, teacher: Teacher, folder: Path) -> None:
    """Writes the teacher's metrics on the evaluation set, by which a training with the answers checks it.

    Raises:
        ValueError: its mAP is below `min_teacher_map`.
    """
    data, least = trainer.eval_dataset, trainer.args.min_teacher_map
    if (folder / METRICS).is_file() or not isinstance(data, DetectionDataset):
        return
    metrics = trainer.evaluate_teacher()
    verdict = None
    if least > 0:
        verdict = check_teacher(teacher, metrics, trainer.student.config.id2label, len(data), least)
    if trainer.is_world_process_zero():
        print(verdict or f"The teacher has {100 * metrics['teacher_map']:.1f} mAP on {len(data)} evaluation images.")
        folder.mkdir(parents=True, exist_ok=True)
        content = {"evaluation": data.images_hash(), "images": len(data), "metrics": metrics}
        (folder / METRICS).write_text(json.dumps(content, indent=2) + "\n")
    PartialState().wait_for_everyone()


def main(argv: list[str]) -> None:
    check_processes()
    arguments = parse(argv, __doc__, command="answer")
    folder = arguments.config.teacher_answers
    if not arguments.config.needs_teacher:
        raise ValueError("Answers are those of a teacher: set --method and --teacher_model_name_or_path.")
    if folder in (None, "auto"):
        raise ValueError("Say where the answers are stored: --teacher_answers path/to/a/new/folder.")
    answer(arguments, Path(str(folder)))
    if PartialState().is_main_process:
        print(f"The answers are in {folder}: train with --teacher_answers {folder}.")
        if arguments.config.hub_answers_id is not None:
            push(Path(str(folder)), arguments.config)


def push(folder: Path, config: DistillationConfig) -> None:
    """Pushes the answers as a data set repository, which is private unless `hub_private_repo` is false."""
    commit = push_answers(
        folder,
        repo_id=str(config.hub_answers_id),
        token=config.hub_token,
        private=config.hub_private_repo is not False,
        revision=config.hub_revision,
        timeout=config.hub_timeout,
    )
    if commit is None:
        sys.exit(1)
    print(f"They are at {commit.commit_url}: train with --teacher_answers {commit.repo_id}.")


if __name__ == "__main__":
    sys.exit(run(main))
