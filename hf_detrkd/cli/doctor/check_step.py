"""The doctor's checks of one real training step and of a run's requirements: memory, time, disk space."""

import math
import shutil
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ...training.config import DistillationConfig
from ...training.trainer import DistillationTrainer
from . import GIB, PeakMemory, fitting_batch, memory_of
from .findings import Report


def check_step(report: Report, trainer: DistillationTrainer, limit: float | None) -> bool:
    """Trains single steps with growing batches up to the requested size; true if that one fits into memory.

    Args:
        report ([`Report`])
        trainer ([`DistillationTrainer`])
        limit (`float`, *optional*): memory in GiB; default: that of the device.
    """
    limit = memory_of(trainer.args.device) if limit is None else limit
    asked = trainer.args.per_device_train_batch_size
    sizes = sorted({size for size in (2, asked // 4, asked // 2) if 1 < size < asked} | {asked})
    trainer.distiller.to(trainer.args.device)
    trainer.create_optimizer()
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0  # leaves the student unchanged
    peaks, seconds = try_batches(trainer, sizes, limit)
    report.facts["memory"] = {"peak_gb": peaks, "limit_gb": limit}
    fits = peaks.get(asked, math.inf) <= limit
    say_memory(report, peaks, sizes, limit, fits)
    if asked in peaks:
        say_time(report, trainer, {k: statistics.median(s[k] for s in seconds) for k in ("read", "step")})
    return fits


def try_batches(
    trainer: DistillationTrainer, sizes: list[int], limit: float
) -> tuple[dict[int, float], list[dict[str, float]]]:
    """Peak GiB of a step by batch size, until memory runs out, and the seconds of the last size's steps."""
    peaks: dict[int, float] = {}
    seconds: list[dict[str, float]] = []
    for size in tqdm(sizes, desc="Trying a step", leave=False):
        if max(peaks.values(), default=0.0) > limit or (len(peaks) > 1 and fitting_batch(peaks, limit) < size):
            break  # not tried: the system may kill a process that runs out of memory
        try:
            with PeakMemory(trainer.args.device) as memory:
                seconds = [one_step(trainer, size) for _ in range(4 if size == sizes[-1] else 2)][1:]
        except torch.OutOfMemoryError:
            break
        peaks[size] = memory.gib
    return peaks, seconds


def one_step(trainer: DistillationTrainer, size: int) -> dict[str, float]:
    """Seconds to load a batch of random training images and to train on it."""
    device, distiller = trainer.args.device, trainer.distiller.train()
    started = time.perf_counter()
    places = torch.randint(len(trainer.train_dataset), (size,)).tolist()
    batch = trainer.data_collator([trainer.train_dataset[place] for place in places])
    ready = time.perf_counter()
    trainer.optimizer.zero_grad()
    inputs = trainer._prepare_inputs(batch)
    with trainer.accelerator.autocast():
        loss = distiller(inputs)["loss"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(distiller.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"read": ready - started, "step": time.perf_counter() - ready}


def say_memory(report: Report, peaks: dict[int, float], sizes: list[int], limit: float, fits: bool) -> None:
    asked = sizes[-1]
    measured = ", ".join(f"{peak:.2f} GiB for a batch of {size}" for size, peak in peaks.items())
    most = fitting_batch(peaks, limit) if len(peaks) > 1 else 0
    text = f"a step needs {measured or f'too much with a batch of {sizes[0]}'}, of {limit:.2f} GiB"
    if not fits:
        would = f"about {most} would fit, with --gradient_accumulation_steps for the same total"
        report.problem(
            "memory",
            f"{text}, and --per_device_train_batch_size {asked} does not fit: "
            f"{would if most else f'not even {sizes[0]} would'}; a smaller --image_size, --bf16 or a smaller teacher "
            "needs less.",
        )
    elif peaks[asked] > 0.9 * limit:
        report.warning("memory", f"{text}: less than a tenth is left.")
    else:
        report.ok("memory", f"{text}{f'; {min(most, 4 * asked)} would fit too' if most > asked else ''}.")


def say_time(report: Report, trainer: DistillationTrainer, seconds: dict[str, float]) -> None:
    """Reports the expected duration of the run, in one process and without evaluations."""
    workers, steps = trainer.args.dataloader_num_workers, steps_of(trainer)
    read, step = seconds["read"], seconds["step"]
    each = max(step, read / workers) if workers else step + read
    whole = each * steps * trainer.args.gradient_accumulation_steps
    report.facts["time"] = {"step_seconds": step, "read_seconds": read, "steps": steps, "seconds": whole}
    text = (
        f"about {in_words(whole)} for {steps} steps in one process, without evaluations: {step:.3f} s to train on a "
        f"batch, and {read:.3f} s to load it with {workers} workers"
    )
    control = "; the control takes additional time" if "control" in report.facts else ""
    if read > step and workers * step < read:
        report.warning("time", f"{text}: more --dataloader_num_workers would help{control}.")
    else:
        report.ok("time", f"{text}{control}.")


def in_words(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"


def steps_of(trainer: DistillationTrainer) -> int:
    args = trainer.args
    return args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch(trainer) * args.num_train_epochs)


def steps_per_epoch(trainer: DistillationTrainer) -> int:
    batches = math.ceil(len(trainer.train_dataset) / trainer.args.per_device_train_batch_size)
    return math.ceil(batches / trainer.args.gradient_accumulation_steps)


def check_terms(report: Report, trainer: DistillationTrainer) -> None:
    """Checks every loss term on a batch, as the run itself does before training."""
    trainer.optimizer.zero_grad(set_to_none=True)
    try:
        found = trainer.probe_losses()
    except ValueError as error:
        report.problem("terms", str(error))
        return
    names = ", ".join(f"{term.name} {term.weighted / found.task:.2g}" for term in found.terms)
    report.ok("terms", f"all are finite and reach the student; their ratios to the task loss are {names}.")


def check_disk(report: Report, config: DistillationConfig, trainer: DistillationTrainer) -> None:
    """Checks the disk space for checkpoints: weights, and two optimizer moments of the trained parameters."""
    parameters = sum(p.numel() for p in trainer.distiller.parameters())
    trained = sum(p.numel() for p in trainer.distiller.parameters() if p.requires_grad)
    one, final = 4 * (parameters + 2 * trained) / GIB, 4 * parameters / GIB
    count = checkpoints_of(config, steps_of(trainer), steps_per_epoch(trainer))
    needed = (count * one + final) * (2 if "control" in report.facts else 1)
    wanted = Path(config.output_dir).absolute()
    folder = next(place for place in (wanted, *wanted.parents) if place.exists())
    free = shutil.disk_usage(folder).free / GIB
    report.facts["disk"] = {"needed_gb": needed, "free_gb": free}
    kept = f"the student and {count} checkpoint{'s' * (count != 1)}" if count else "the student"
    text = f"about {needed:.2f} GiB are needed for {kept}, and {folder} has {free:.1f} GiB free"
    if needed > free:
        report.problem("disk", f"{text}: set --save_total_limit, or another --output_dir.")
    else:
        report.ok("disk", f"{text}.")


def checkpoints_of(config: DistillationConfig, steps: int, steps_per_epoch: int) -> int:
    """Maximum number of checkpoints at the same time."""
    kind = str(config.save_strategy.value)
    epochs = math.ceil(steps / steps_per_epoch)
    every = {"no": 0, "best": epochs, "epoch": epochs}  # every epoch may be the best
    interval = config.save_steps if config.save_steps >= 1 else max(1, config.save_steps * steps)
    made = every.get(kind, math.ceil(steps / interval))
    return made if config.save_total_limit is None else min(made, config.save_total_limit + 1)
