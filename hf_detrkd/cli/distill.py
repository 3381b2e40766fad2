r"""Distils a detection transformer into a smaller one, or trains one without a teacher.

The quickstart, on generated images:

    hf-detrkd distill --config quickstart

Your own images, in COCO layout, from the Hub's weights:

    hf-detrkd distill --model_name_or_path PekingU/rtdetr_r18vd --dataset_name path/to/folder \
        --teacher_model_name_or_path path/to/teacher --method kd_detr --output_dir outputs/student --bf16

`--method detrdistill --help` also lists the method's own options; `--method kd_detr,clockdistill` runs both in one
step. A recipe can set any argument; the command line overrides it.

Unless arguments say otherwise, a run takes 50 epochs with a learning rate of 1e-4 (1e-5 for a trained backbone) that
rises in the first 5 % of the steps and falls as a cosine, and a weight decay of 1e-4. It evaluates and saves after
each epoch, and ends with the best student.
"""

import sys
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import PreTrainedModel, TrainerState, set_seed

from ..artifacts.hub.background_push import PushedCommit
from ..artifacts.record import figures_row, row_of
from ..artifacts.redaction import portable_command, under_home
from ..artifacts.run_folder import (
    RECIPE,
    RESULTS,
    STATE,
    check_free,
    check_output_folder,
    delete_run,
    read_json,
    write_recipe,
)
from ..artifacts.run_lock import run_lock
from ..artifacts.trackers import close_trackers
from ..artifacts.whole_checkpoints import checkpoints_of
from ..data import DetectionSplits
from ..data.text import there
from ..distillation.stored_teacher import StoredTeacher
from ..distillation.teacher import Teacher
from ..training.config import DistillationConfig
from ..training.finish import finish_run
from ..training.run_facts import stored_rows, student_name
from ..training.trainer import DistillationTrainer
from .answer import answer_if_auto
from .arguments import Arguments, parse, published, resolved
from .launching import check_processes
from .run_setup import RunSplits, build_trainer, check_data, control_of, load_run_splits, models_of
from .screen import run


def train(trainer: DistillationTrainer) -> dict[str, float]:
    """Trains, evaluates and saves; returns the final metrics. A finished run is only evaluated."""
    config = trainer.args
    checkpoint: str | bool | None = config.resume_from_checkpoint
    ended = ended_run(config) if checkpoint else None
    if checkpoint in ("true", "True", True) and not checkpoints_of(config.output_dir):
        checkpoint = None  # the first start of a job that is queued again when it is stopped
    if ended is None:
        set_seed(config.seed)  # a student is the same with and without a control before it
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model(_internal_call=True)  # pushed later, with the card
        trainer.save_state()
    else:
        trainer.announce(f"The run in {under_home(config.output_dir)} has ended: its student is evaluated as it is.")
        trainer.load_student(Path(config.output_dir))
        trainer.state = TrainerState.load_from_json(str(Path(config.output_dir) / STATE))
        metrics = {name: value for name, value in ended.items() if name.startswith("train_")}
    metrics |= trainer.evaluate()
    trainer.save_metrics("all", metrics)
    return metrics


def ended_run(config: DistillationConfig) -> dict[str, float] | None:
    """The results in the output folder, if the run to resume is finished and no further steps are requested."""
    folder = Path(config.output_dir)
    state, results = read_json(folder / STATE), read_json(folder / RESULTS)
    if not results or not (folder / "config.json").is_file():
        return None
    if config.max_steps > 0:
        return results if state.get("global_step", 0) >= config.max_steps else None
    return results if (state.get("epoch") or 0) >= config.num_train_epochs else None


def teacher_metrics(trainer: DistillationTrainer) -> dict[str, float]:
    """The teacher's metrics on the whole evaluation set, after the check of its minimum mAP."""
    if not trainer.args.resume_from_checkpoint:
        trainer.check_teacher()
    seen = trainer.args.teacher_check_samples or len(trainer.eval_dataset)
    metrics = trainer.teacher_metrics
    if metrics is None or seen < len(trainer.eval_dataset):
        metrics = trainer.evaluate_teacher()
    return {name.replace("teacher_", "eval_", 1): value for name, value in metrics.items()}


def teacher_rows(trainer: DistillationTrainer) -> dict[str, dict[str, Any]]:
    """The rows of the summary of a run's teachers, by name."""
    teacher, id2label = trainer.distiller.teacher, trainer.student.config.id2label
    if isinstance(teacher, StoredTeacher):
        if not trainer.args.resume_from_checkpoint:
            trainer.check_teacher()
        return stored_rows(teacher, trainer.eval_dataset, id2label)
    figures = {name.removeprefix("eval_"): value for name, value in teacher_metrics(trainer).items()}
    return {"teacher": figures_row(id2label, cast(Teacher, teacher).num_parameters, figures)}


def row(model: PreTrainedModel, metrics: dict[str, float]) -> dict[str, Any]:
    """One row of the summary."""
    figures = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    return row_of(model, figures, metrics.get("train_seconds_per_step"))


def table(summary: dict[str, dict[str, Any]]) -> str:
    """The summary as text."""
    lines = [f"{'':12}{'mAP':>8}{'mAP50':>8}{'parameters':>12}{'s / step':>10}"]
    for name, values in summary.items():
        seconds = values["seconds_per_step"]
        speed = "-" if seconds is None else f"{seconds:.3f}"
        found = (values["map"], values["map_50"])
        cells = (f"{'-' if value is None else format(100 * value, '.1f'):>8}" for value in found)
        size = "-" if values["parameters"] is None else f"{values['parameters']:,}"
        lines.append(f"{name:12}{''.join(cells)}{size:>12}{speed:>10}")
    return "\n".join(lines)


def facts_of(arguments: Arguments, splits: RunSplits, trainer: DistillationTrainer, argv: list[str]) -> dict:
    """Facts about data and command for the run's card."""
    script = arguments.script
    data = str(script.dataset_name)
    local, base = there(data), script.model_name_or_path
    return {
        # A folder named like a known data set is still someone's own.
        "dataset_name": f"{Path(data).resolve().name} (local folder)" if local else data,
        "hub_dataset": None if local or data == "shapes" else data,
        "train_split": splits.train_name,
        "eval_split": splits.eval_name,
        "base_model": None if base is None or there(base) else base,
        "command": command_of(trainer, argv),
        "arguments": published(arguments),
    }


def command_of(trainer: DistillationTrainer, argv: list[str]) -> str:
    """Command that repeats the run elsewhere, including the settings from accelerate's configuration."""
    config, precision = trainer.args, trainer.accelerator.mixed_precision
    launch = ["--num_processes", str(config.world_size)] if config.world_size > 1 else []
    if launch and config.use_cpu:
        launch = ["--multi_gpu", *launch]  # otherwise accelerate starts one process
    if precision != "no" and not (config.bf16 or config.fp16):
        launch += ["--mixed_precision", precision]
    words = iter(argv)
    again = [word for word in words if not (word == "--resume_from_checkpoint" and next(words, True))]
    again = [word for word in again if word != "--overwrite_output_dir"]
    return portable_command(["hf-detrkd", "distill", *launch, *again])


def main(argv: list[str]) -> None:
    check_processes()
    arguments = parse(argv, __doc__)
    if arguments.script.dry_run:
        if arguments.config.process_index == 0:
            print(yaml.safe_dump(resolved(arguments), sort_keys=False), end="")
        return
    check_output_folder(arguments.config.output_dir, models_of(arguments))
    folder, first = arguments.config.output_dir, arguments.config.process_index == 0
    with run_lock(folder, first):
        if first:
            make_place(arguments)
        distill(arguments, argv)


def make_place(arguments: Arguments) -> None:
    """Checks the run that the output folder holds, or deletes it with `--overwrite_output_dir`."""
    folder, resumes = arguments.config.output_dir, bool(arguments.config.resume_from_checkpoint)
    if not arguments.script.overwrite_output_dir:
        check_free(folder, arguments.recipe, resumes, arguments.defaults)
    elif not resumes:
        delete_run(folder)


def distill(arguments: Arguments, argv: list[str]) -> None:
    """A whole run: answers, control and student, and their card."""
    config, splits = arguments.config, load_run_splits(arguments)
    check_data(arguments, splits)
    if isinstance(splits, DetectionSplits):
        answer_if_auto(arguments, splits)
    models: dict[str, PreTrainedModel | Teacher] = {}
    trainer = build_trainer(arguments, splits)
    record = trainer.record
    record.add_facts(facts_of(arguments, splits, trainer, argv))
    fresh = not config.resume_from_checkpoint or not (Path(config.output_dir) / RECIPE).is_file()
    if trainer.is_world_process_zero() and fresh:
        write_recipe(Path(config.output_dir), arguments.recipe)
    if trainer.distiller.teacher is not None:
        teacher = trainer.distiller.teacher
        if isinstance(teacher, Teacher):
            models["teacher"] = teacher
        for name, found in teacher_rows(trainer).items():
            record.add_model(name, found)
    if arguments.script.run_control:
        trainer.announce("Training 1 of 2: the control, the same student without distillation.")
        control = build_trainer(arguments, splits, control_of(config))
        record.add_model("control", row(control.student, train(control)), control.compute_metrics.precision)
        models["control"] = control.student
        close_trackers(control)
        trainer.announce(f"Training 2 of 2: the student with {config.method}.")
    name = student_name(config)
    record.add_model(name, row(trainer.student, train(trainer)))
    models[name] = trainer.student
    pushed = finish_run(trainer, models, arguments.script.measure_efficiency)
    if trainer.is_world_process_zero():
        print(table(record.models))
        print(f"The student is in {under_home(config.output_dir)}, with its card, report.html and plots.")
        if config.push_to_hub:
            push: Any = trainer.push_in_progress
            print(
                f"Pushed to {pushed.commit_url}."
                if isinstance(pushed, PushedCommit)
                else f"Not pushed: {push.command}"
            )
    trainer.accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run(main))
