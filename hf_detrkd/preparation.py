"""What a run does before its first step: the teacher's check, the weights of the terms, and a probe of every term."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import yaml
from tqdm import tqdm
from transformers.utils import logging

from .methods import DistillationMethod
from .privacy import under_home
from .probe import Probe, calibrate, probe
from .run_files import RECIPE
from .teacher_check import check_teacher


if TYPE_CHECKING:
    from .trainer import DistillationTrainer


logger = logging.get_logger(__name__)

PROBED = 4  # batches: a term that is zero in one may be there in the next


def prepare(trainer: DistillationTrainer, resumes: bool) -> None:
    """All checks that the arguments ask for, in their order; a resumed run was checked when it began.

    Raises:
        ValueError: the teacher is too weak, does not see what was asked, or a term would not teach.
    """
    args = trainer.args
    if not trainer.distiller.methods or not args.distillation_weight:
        return
    if trainer.distiller.teacher is not None:
        trainer.announce(trainer.distiller.teacher.class_map.table())
    if resumes:
        return
    check_teacher(trainer)
    if not (args.calibrate_weights or args.probe):
        return
    in_parts = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if in_parts or not isinstance(trainer.train_dataset, Sized):
        reason = "DeepSpeed and FSDP hold the weights in parts" if in_parts else "its training set has no length"
        logger.warning(f"The terms are neither probed nor calibrated before this run: {reason}.")
        return
    trainer.student.to(args.device)
    check_view(trainer)
    if args.calibrate_weights:
        set_weights(trainer)
    if args.probe:
        probe_terms(trainer)


def check_view(trainer: DistillationTrainer) -> None:
    """
    Raises:
        ValueError: the teacher shall see another size, but the data set does not show it.
    """
    if trainer.args.teacher_image_size is None or trainer.distiller.teacher is None:
        return
    batch = next(batches_with_boxes(trainer, 1))
    size = "x".join(map(str, batch["pixel_values"].shape[-2:]))
    if "teacher_pixel_values" not in batch and trainer.args.teacher_image_size not in (size, size.split("x")[0]):
        raise ValueError(
            f"teacher_image_size is {trainer.args.teacher_image_size}, but the data set shows the teacher nothing of "
            f"its own, and the student {size}: give DetectionTransform the teacher_size."
        )


def probe_terms(trainer: DistillationTrainer) -> Probe:
    """Measures every term on a batch and prints the table; where a term is zero, on further batches.

    Raises:
        ValueError: a term is not finite, or is zero or does not reach the student in all of them.
    """
    distiller = trainer.distiller
    seen: list[Probe] = []
    faults: dict[str, str] = {}
    for batch in batches_with_boxes(trainer, PROBED):
        found = probe(distiller, batch, precision_of(trainer))
        # A part is off where all its layers are: a key may weigh single layers.
        weights = {term.name: max(map(abs, distiller.weights_under(term.name))) for term in found.terms}
        now = found.faults(weights)
        faults = {name: fault for name, fault in now.items() if not seen or name in faults}
        seen.append(found)
        if not faults:
            break
    trainer.announce(seen[0].table())
    gated = any(cast(DistillationMethod, method).gated for method in distiller.methods.values())
    silent = [name for name, fault in faults.items() if fault == "zero"] if gated else []
    if silent:  # a teacher that is nowhere better in a few images is no fault
        logger.warning(f"The gate lets nothing through of {', '.join(silent)} in the first images.")
    seen[0].refuse({name: fault for name, fault in faults.items() if name not in silent})
    return seen[0]


def set_weights(trainer: DistillationTrainer) -> None:
    """Calibrates the weights, uses them, and writes them into the recipe of the output folder."""
    args, distiller = trainer.args, trainer.distiller
    count = args.calibrate_weights
    hidden = args.disable_tqdm or not trainer.is_world_process_zero()
    batches = tqdm(batches_with_boxes(trainer, count), total=count, desc="Calibrating the weights", disable=hidden)
    ratios = calibrate(distiller, batches, count, args.learning_rate, args.max_grad_norm, precision_of(trainer))
    # The same keys in the same order on every process; NaN where a term was silent.
    everyone = trainer.accelerator.gather(torch.tensor([list(ratios.values())], device=args.device)).nanmean(0)
    for name, ratio in zip(ratios, everyone.tolist(), strict=True):
        if distiller.loss_weights[name] and ratio != ratio:
            raise ValueError(
                f"No weight can be found for {name}: in {count} steps no gradient of it reached the student, or the "
                "task loss was not finite. Set its weight to 0, or lower --learning_rate."
            )
        if ratio == ratio:
            distiller.loss_weights[name] *= args.calibration_fraction * ratio
    trainer.announce("Calibrated weights: " + ", ".join(f"{k} {v:.3g}" for k, v in distiller.loss_weights.items()))
    if trainer.is_world_process_zero():
        change_recipe(Path(args.output_dir), {"loss_weights": distiller.loss_weights, "calibrate_weights": 0})


def write_recipe(folder: Path, arguments: dict[str, Any]) -> None:
    """Writes the recipe of an output folder, without tokens, and with `~` for the home folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(yaml.safe_dump(under_home(arguments), sort_keys=False))


def change_recipe(folder: Path, arguments: dict[str, Any]) -> None:
    """Sets arguments in the recipe of an output folder, which is made where there is none."""
    file = folder / RECIPE
    recipe = (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}
    write_recipe(folder, recipe | arguments)


def precision_of(trainer: DistillationTrainer) -> Any:
    """The training's autocast; float32 in place of float16, whose gradients would need a scaler."""
    return nullcontext if trainer.accelerator.mixed_precision == "fp16" else trainer.accelerator.autocast


def batches_with_boxes(trainer: DistillationTrainer, count: int) -> Iterator[dict[str, Any]]:
    """Batches of random training images, other ones on each process; a batch without a box is drawn again, a few
    times."""
    dataset: Any = trainer.train_dataset
    generator = torch.Generator().manual_seed(trainer.args.seed * 1000 + trainer.args.process_index)
    size = trainer.args.per_device_train_batch_size
    for _ in range(count):
        for _ in range(20):
            places = torch.randint(len(dataset), (size,), generator=generator).tolist()
            batch = trainer.data_collator([dataset[place] for place in places])
            if any(len(label["class_labels"]) for label in batch["labels"]):
                break
        yield trainer._prepare_inputs(batch)
