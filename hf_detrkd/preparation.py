"""What a run does before its first step: the teacher's mAP, the weights of the terms, and a probe of every term."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch.utils.data import Subset
from tqdm import tqdm
from transformers.utils import logging

from .adapters import class_names
from .evaluation import class_figures
from .guards import refuse_weak_teacher
from .probe import Probe, calibrate, probe


if TYPE_CHECKING:
    from .trainer import DistillationTrainer


logger = logging.get_logger(__name__)

RECIPE = "recipe.yaml"  # in the output folder: the arguments that repeat the run


def prepare(trainer: DistillationTrainer, resumes: bool) -> None:
    """All checks that the arguments ask for, in their order; a resumed run keeps the weights of its checkpoint.

    Raises:
        ValueError: the teacher is too weak, or a term would not teach.
    """
    if not trainer.distiller.methods or not trainer.args.distillation_weight:
        return
    if trainer.distiller.teacher is not None:
        announce(trainer, trainer.distiller.teacher.class_map.table())
    if not resumes:
        check_teacher(trainer)
        if trainer.args.calibrate_weights:
            set_weights(trainer)
    if trainer.args.probe:
        probe_terms(trainer)


def announce(trainer: DistillationTrainer, text: str) -> None:
    """Prints on the first process alone."""
    if trainer.is_world_process_zero():
        print(text, flush=True)


def check_teacher(trainer: DistillationTrainer) -> None:
    """Evaluates the teacher on the evaluation set or its first images; `teacher_results.json` keeps the figures.

    Raises:
        ValueError: its mAP over the classes that it knows is below `min_teacher_map`.
    """
    args, teacher, dataset = trainer.args, trainer.distiller.teacher, trainer.eval_dataset
    if teacher is None or args.min_teacher_map <= 0 or trainer.teacher_metrics is not None:
        return
    if not hasattr(dataset, "__len__"):
        logger.warning("There is no evaluation set to check the teacher on: it teaches unseen.")
        return
    images = min(len(dataset), args.teacher_check_samples or len(dataset))
    metrics = trainer.evaluate_teacher(dataset=dataset if images == len(dataset) else Subset(dataset, range(images)))
    trainer.save_metrics("teacher", metrics, combined=False)
    trainer.teacher_metrics = metrics
    map_name = "teacher_map"
    if map_name not in metrics:
        logger.warning("compute_metrics gives no `map`: the teacher is not checked.")
        return
    found = metrics[map_name]
    if not teacher.class_map.is_complete:
        named = class_figures(dict(enumerate(class_names(trainer.student.config))))
        known = [named[i] for i, column in enumerate(teacher.class_map.columns) if column is not None]
        values = [metrics[f"teacher_{name}"] for name in known if metrics[f"teacher_{name}"] >= 0]
        found = sum(values) / max(1, len(values))
    announce(trainer, f"The teacher has a mAP of {found:.3f} on {images} evaluation images.")
    refuse_weak_teacher(found, args.min_teacher_map, images, teacher.class_map.table())


def probe_terms(trainer: DistillationTrainer) -> Probe:
    """Measures every term on one batch and prints the table.

    Raises:
        ValueError: a term is not finite, is zero or does not reach the student.
    """
    batch = next(batches_with_boxes(trainer, 1))
    found = probe(trainer.distiller, batch, precision_of(trainer))
    announce(trainer, found.table())
    distiller = trainer.distiller
    names = [term.name for term in found.terms]
    # A part is off where all its layers are: a key may weigh single layers.
    found.refuse_silence({name: max(map(abs, distiller.weights_under(name))) for name in names})
    return found


def set_weights(trainer: DistillationTrainer) -> None:
    """Calibrates the weights, uses them, and writes them into the recipe of the output folder."""
    args, distiller = trainer.args, trainer.distiller
    count = args.calibrate_weights
    batches = tqdm(
        batches_with_boxes(trainer, count), total=count, desc="Calibrating the weights", disable=args.disable_tqdm
    )
    found = calibrate(
        distiller, batches, args.calibration_fraction, args.learning_rate, args.max_grad_norm, precision_of(trainer)
    )
    values = torch.tensor(list(found.values()), device=args.device)
    values = trainer.accelerator.reduce(values, "mean")
    distiller.loss_weights |= dict(zip(found, values.tolist(), strict=True))
    announce(trainer, "Calibrated weights: " + ", ".join(f"{k} {distiller.loss_weights[k]:.3g}" for k in found))
    if trainer.is_world_process_zero():
        change_recipe(Path(args.output_dir), {"loss_weights": distiller.loss_weights, "calibrate_weights": 0})


def write_recipe(folder: Path, arguments: dict[str, Any]) -> None:
    """Writes the recipe of an output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(yaml.safe_dump(arguments, sort_keys=False))


def change_recipe(folder: Path, arguments: dict[str, Any]) -> None:
    """Sets arguments in the recipe of an output folder, which is made where there is none."""
    file = folder / RECIPE
    recipe = (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}
    write_recipe(folder, recipe | arguments)


def precision_of(trainer: DistillationTrainer) -> Any:
    """The training's autocast; float32 in place of float16, whose gradients would need a scaler."""
    return nullcontext if trainer.accelerator.mixed_precision == "fp16" else trainer.accelerator.autocast


def batches_with_boxes(trainer: DistillationTrainer, count: int) -> Iterator[dict[str, Any]]:
    """Batches of random training images, of which those without a box are passed over; another order on each
    process."""
    dataset: Any = trainer.train_dataset
    generator = torch.Generator().manual_seed(trainer.args.seed + trainer.args.process_index)
    size, items, tried = trainer.args.per_device_train_batch_size, [], 0
    while count:
        index = int(torch.randint(len(dataset), (), generator=generator))
        item, tried = dataset[index], tried + 1
        if len(item["labels"]["class_labels"]) or tried > 20 * size:
            items.append(item)
        if len(items) == size:
            yield trainer._prepare_inputs(trainer.data_collator(items))
            items, tried, count = [], 0, count - 1
