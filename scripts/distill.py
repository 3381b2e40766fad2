"""Distils a detection transformer into a smaller one, or trains one without a teacher.

The quickstart, on generated images:

    accelerate launch scripts/distill.py --config scripts/recipes/quickstart.yaml

Your own images, in COCO layout, from the Hub's weights:

    accelerate launch scripts/distill.py --model_name_or_path PekingU/rtdetr_r18vd --dataset_name path/to/folder \
        --teacher_model_name_or_path path/to/teacher --method kd_detr --output_dir outputs/student \
        --num_train_epochs 50 --learning_rate 1e-4 --eval_strategy epoch --save_strategy epoch --bf16

`--method detrdistill --help` shows all arguments, with the method's own at the end; `--method kd_detr,clockdistill`
runs both in one step. A recipe sets any argument; the command line wins.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from distill_arguments import Arguments, ScriptArguments, parse, resolved
from transformers import AutoModelForObjectDetection, PreTrainedModel, TrainerState, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_detrkd import DistillationConfig, DistillationTrainer
from hf_detrkd.data import (
    AugmentationConfig,
    DetectionDataset,
    DetectionSplits,
    DetectionTransform,
    load_detection_splits,
    parse_image_size,
)
from hf_detrkd.finishing import finish_run
from hf_detrkd.initialization import init_from_teacher
from hf_detrkd.launching import check_processes
from hf_detrkd.preparation import write_recipe
from hf_detrkd.privacy import portable_command, under_home
from hf_detrkd.recording import row_of, student_name
from hf_detrkd.run_files import RESULTS, STATE, check_output_folder, read_json
from hf_detrkd.students import build_student, load_backbone_weights, load_image_processor, load_student
from hf_detrkd.teacher import Teacher
from hf_detrkd.teacher_check import check_teacher
from hf_detrkd.tracking import close_trackers


def make_student(
    script: ScriptArguments, classes: list[str], config: DistillationConfig
) -> tuple[PreTrainedModel, Any]:
    """Student and image processor; the same seed gives the same weights."""
    set_seed(config.seed)
    if script.config_name is not None:
        model = build_student(script.config_name, classes)
        if script.init_from_teacher:
            print(inherit(model, config))
        if script.backbone_weights is not None:
            load_backbone_weights(model, script.backbone_weights)
    else:
        model = load_student(script.model_name_or_path, classes, script.model_revision)
    size = parse_image_size(script.image_size)
    ratio, revision = script.keep_aspect_ratio, script.model_revision
    processor = load_image_processor(model, script.model_name_or_path, size, ratio, revision)
    return model, processor


def inherit(student: PreTrainedModel, config: DistillationConfig) -> str:
    """Starts a student from the run's teacher; returns what was copied and what was not."""
    name, revision = config.teacher_model_name_or_path, config.teacher_model_revision
    if name is None:
        raise ValueError("--init_from_teacher needs --teacher_model_name_or_path.")
    teacher = AutoModelForObjectDetection.from_pretrained(name, revision=revision, dtype=torch.float32)
    return init_from_teacher(student, teacher).summary()


def with_transforms(
    splits: DetectionSplits, processor: Any, augmentation: AugmentationConfig, config: DistillationConfig
) -> tuple[DetectionDataset, DetectionDataset]:
    """Training and evaluation set as the student's image processor and the teacher want them."""
    seen = parse_image_size(config.teacher_image_size) if config.needs_teacher else None
    transforms = (
        DetectionTransform.for_processor(processor, kind, teacher_size=seen) for kind in (augmentation, None)
    )
    return splits.train.with_transform(next(transforms), config.seed), splits.eval.with_transform(next(transforms))


def train(trainer: DistillationTrainer) -> dict[str, float]:
    """Trains, evaluates and saves; returns the final metrics. A run that has ended already is evaluated alone."""
    config = trainer.args
    checkpoint = config.resume_from_checkpoint
    if checkpoint in ("true", "True", True):
        checkpoint = get_last_checkpoint(config.output_dir)
    ended = ended_run(config, checkpoint)
    if ended is None:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model(_internal_call=True)  # the push waits for the card
        trainer.save_state()
    else:
        trainer.load_student(Path(config.output_dir))
        trainer.state = TrainerState.load_from_json(str(Path(config.output_dir) / STATE))
        metrics = {name: value for name, value in ended.items() if name.startswith("train_")}
    metrics |= trainer.evaluate()
    trainer.save_metrics("all", metrics)
    return metrics


def ended_run(config: DistillationConfig, checkpoint: str | None) -> dict[str, float] | None:
    """The results in the output folder, where the run to resume had ended and no further steps are asked for."""
    folder = Path(config.output_dir)
    state, results = read_json(folder / STATE), read_json(folder / RESULTS)
    if checkpoint is None or not results or not (folder / "config.json").is_file():
        return None
    if config.max_steps > 0:
        return results if state.get("global_step", 0) >= config.max_steps else None
    return results if (state.get("epoch") or 0) >= config.num_train_epochs else None


def teacher_metrics(trainer: DistillationTrainer) -> dict[str, float]:
    """The teacher's figures on the whole evaluation set, after the check that it can teach at all."""
    if not trainer.args.resume_from_checkpoint:
        check_teacher(trainer)
    seen = trainer.args.teacher_check_samples or len(trainer.eval_dataset)
    metrics = trainer.teacher_metrics
    if metrics is None or seen < len(trainer.eval_dataset):
        metrics = trainer.evaluate_teacher()
    return {name.replace("teacher_", "eval_", 1): value for name, value in metrics.items()}


def row(model: PreTrainedModel, metrics: dict[str, float]) -> dict[str, Any]:
    """One line of the summary."""
    figures = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    return row_of(model, figures, metrics.get("train_seconds_per_step"))


def table(summary: dict[str, dict[str, float | None]]) -> str:
    """The summary as text."""
    lines = [f"{'':12}{'mAP':>8}{'mAP50':>8}{'parameters':>12}{'s / step':>10}"]
    for name, values in summary.items():
        seconds = values["seconds_per_step"]
        speed = "-" if seconds is None else f"{seconds:.3f}"
        figures = f"{100 * values['map']:8.1f}{100 * values['map_50']:8.1f}{values['parameters']:12,}{speed:>10}"
        lines.append(f"{name:12}{figures}")
    return "\n".join(lines)


def load_splits(arguments: Arguments) -> DetectionSplits:
    """The run's data set, read by one process at a time."""
    script = arguments.script
    with arguments.config.main_process_first(desc="reading the data set"):
        return load_detection_splits(
            script.dataset_name,
            train_split=script.dataset_train_split,
            eval_split=script.dataset_eval_split,
            max_train_samples=script.max_train_samples,
            max_eval_samples=script.max_eval_samples,
            skip_unreadable_images=script.skip_unreadable_images,
        )


def build_trainer(
    arguments: Arguments, splits: DetectionSplits | None = None, config: DistillationConfig | None = None
) -> DistillationTrainer:
    """The trainer of a run.

    Args:
        arguments ([`Arguments`])
        splits (*optional*): the data set, where it is loaded already.
        config (*optional*): in place of that of the arguments: the control's.
    """
    config, splits = config or arguments.config, splits or load_splits(arguments)
    model, processor = make_student(arguments.script, splits.train.classes, config)
    train_set, eval_set = with_transforms(splits, processor, arguments.augmentation, config)
    return DistillationTrainer(
        model=model,
        args=config,
        method_config=arguments.methods if config.methods else None,
        processing_class=processor,
        train_dataset=train_set,
        eval_dataset=eval_set,
    )


def control_of(config: DistillationConfig) -> DistillationConfig:
    """The same run without a teacher, in a folder of its own."""
    folder = str(Path(config.output_dir) / "control")
    resume = config.resume_from_checkpoint in ("true", "True", True)  # a given checkpoint is of the other run
    return dataclasses.replace(
        config,
        method="none",
        loss_weights=None,
        output_dir=folder,
        run_name=f"{config.run_name}-control",
        resume_from_checkpoint=resume or None,
        push_to_hub=False,
    )


def models_of(arguments: Arguments) -> dict[str, str | None]:
    """Hub ids and folders that a run loads, by what they are to it."""
    script = arguments.script
    named = {"student": script.model_name_or_path, "student's config": script.config_name}
    return named | {"teacher": arguments.config.teacher_model_name_or_path}


def facts_of(arguments: Arguments, splits: DetectionSplits, trainer: DistillationTrainer, argv: list[str]) -> dict:
    """What the run's card says of its data and its command."""
    script = arguments.script
    on_hub = script.dataset_name != "shapes" and not Path(script.dataset_name).expanduser().exists()
    base = script.model_name_or_path
    return {
        "dataset_name": script.dataset_name,
        "hub_dataset": script.dataset_name if on_hub else None,
        "train_split": splits.train_name,
        "eval_split": splits.eval_name,
        "base_model": None if base is None or Path(base).expanduser().exists() else base,
        "command": command_of(trainer, argv),
        "arguments": resolved(arguments),
    }


def command_of(trainer: DistillationTrainer, argv: list[str]) -> str:
    """What repeats the run elsewhere, with what it took from accelerate's configuration."""
    config, precision = trainer.args, trainer.accelerator.mixed_precision
    launch = ["--num_processes", str(config.world_size)] if config.world_size > 1 else []
    launch = ["--multi_gpu", *launch] if launch and config.use_cpu else launch  # or accelerate starts one process
    if precision != "no" and not (config.bf16 or config.fp16):
        launch += ["--mixed_precision", precision]
    words = iter(argv)
    again = [word for word in words if not (word == "--resume_from_checkpoint" and next(words, True))]
    return portable_command(["accelerate", "launch", *launch, "scripts/distill.py", *again])


def main(argv: list[str]) -> None:
    check_processes()
    arguments = parse(argv, __doc__)
    if arguments.script.dry_run:
        if arguments.config.process_index == 0:
            print(yaml.safe_dump(resolved(arguments), sort_keys=False), end="")
        return
    check_output_folder(arguments.config.output_dir, models_of(arguments))
    config, splits = arguments.config, load_splits(arguments)
    models: dict[str, PreTrainedModel | Teacher] = {}
    trainer = build_trainer(arguments, splits)
    rows = trainer.record.models
    trainer.record.facts |= facts_of(arguments, splits, trainer, argv)
    if trainer.is_world_process_zero() and not config.resume_from_checkpoint:
        write_recipe(Path(config.output_dir), arguments.recipe)
    if trainer.distiller.teacher is not None:
        models["teacher"] = trainer.distiller.teacher
        rows["teacher"] = row(trainer.distiller.teacher.model, teacher_metrics(trainer))
    if arguments.script.run_control:
        control = build_trainer(arguments, splits, control_of(config))
        rows["control"], models["control"] = row(control.student, train(control)), control.student
        trainer.record.precision["control"] = control.compute_metrics.precision
        close_trackers(control)
    name = student_name(config)
    rows[name], models[name] = row(trainer.student, train(trainer)), trainer.student
    pushed = finish_run(trainer, models, arguments.script.measure_efficiency)
    if trainer.is_world_process_zero():
        print(table(rows))
        print(f"The student is in {under_home(config.output_dir)}, with its card, report.html and pictures.")
        if config.push_to_hub:
            print(f"It is at {pushed.commit_url}." if pushed else f"Not pushed: {trainer.push_in_progress.command}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
