"""The trainer's part of the checks before the first step: it evaluates, prints and stores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..artifacts.record import Record
from ..artifacts.run_folder import change_recipe
from ..distillation.distiller import Distiller
from ..distillation.prediction import evaluate_teacher
from .loss_probe import Precision, Probe
from .preflight import (
    PROBED,
    batches_with_boxes,
    calibrated_weights,
    check_teacher,
    check_view,
    first_dataset,
    probe_terms,
    spread_sample,
)


if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

logger = logging.get_logger(__name__)


class PreflightMixin(Trainer):
    """Checks of a `Trainer` before its first step; stands before `Trainer` among the bases."""

    args: Any
    record: Record
    teacher_metrics: dict[str, float] | None = None  # of [`check_teacher`]

    @property
    def distiller(self) -> Distiller:
        """The module that is trained, without wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def student(self) -> PreTrainedModel:
        """The plain model, without anything around it."""
        return self.distiller.student

    def evaluate_teacher(self, dataset: Any = None) -> dict[str, float]:
        """COCO metrics of the teacher, on the images that it will teach from; all processes call it.

        Args:
            dataset (*optional*): default: the evaluation set.

        Raises:
            ValueError: the run has no teacher.
        """
        teacher, args = self.distiller.teacher, self.args
        if teacher is None:
            raise ValueError("This run has no teacher to evaluate: it trains with --method none.")
        dataset = self.eval_dataset if dataset is None else dataset
        mine = Subset(dataset, range(args.process_index, len(dataset), args.world_size))
        loader = DataLoader(
            mine, args.eval_batch_size, collate_fn=self.data_collator, num_workers=args.dataloader_num_workers
        )
        batches = (self._prepare_inputs(batch) for batch in self._progress(loader, "Evaluating the teacher"))
        metrics, curves = evaluate_teacher(teacher, batches, self.student.config.id2label)
        if curves is not None:
            self.record.precision["teacher"] = curves
        return metrics

    def _preflight(self, resumes: bool) -> None:
        """All checks that the arguments ask for, in their order; a resumed run was checked when it began.

        Raises:
            ValueError: the teacher is too weak, its view is missing, or a term would not teach.
        """
        args, distiller = self.args, self.distiller
        if not distiller.methods or not args.distillation_weight:
            return
        if distiller.teacher is not None:
            self.announce(distiller.teacher.class_map.table())
        if resumes:
            return
        self.check_teacher()
        if not (args.calibrate_weights or args.probe):
            return
        if self.weights_are_sharded or not isinstance(self.train_dataset, Sized):
            reason = "DeepSpeed and FSDP shard the weights" if self.weights_are_sharded else "a stream has no length"
            logger.warning(f"The loss terms are neither probed nor calibrated before this run: {reason}.")
            return
        self.student.to(args.device)
        if args.teacher_image_size is not None and distiller.teacher is not None:
            check_view(next(self._random_batches(1)), args.teacher_image_size)
        if args.calibrate_weights:
            self._calibrate_weights()
        if args.probe:
            self.probe_losses()

    def check_teacher(self) -> None:
        """Evaluates the teacher on images spread over the evaluation set, unless it was; `teacher_results.json` keeps
        the metrics.

        Raises:
            ValueError: its mAP over the classes that it knows is below `min_teacher_map`.
        """
        args, teacher = self.args, self.distiller.teacher
        if teacher is None or args.min_teacher_map <= 0 or self.teacher_metrics is not None:
            return
        dataset = first_dataset(self.eval_dataset)
        if dataset is None:
            logger.warning("The teacher is not checked: there is no evaluation set with a length.")
            return
        sample = spread_sample(dataset, args.teacher_check_samples)
        self.teacher_metrics = self.evaluate_teacher(sample)
        self.save_metrics("teacher", self.teacher_metrics, combined=False)
        id2label = self.student.config.id2label
        verdict = check_teacher(teacher, self.teacher_metrics, id2label, len(sample), args.min_teacher_map)
        if verdict is None:
            logger.warning(f"The teacher is not checked: none of {len(sample)} evaluation images shows its classes.")
        else:
            self.announce(verdict)

    def probe_losses(self) -> Probe:
        """Measures value and gradient of every loss term on a batch and prints the table.

        Raises:
            ValueError: a term is not finite, or is zero or does not reach the student in the first batches.
        """
        found = probe_terms(self.distiller, self._random_batches(PROBED), self._probe_precision)
        self.announce(found.probe.table())
        if found.silent:  # a teacher that is nowhere better in a few images is no fault
            names = ", ".join(found.silent)
            logger.warning(f"No element of {names} passed the gate in the first batches: these losses are zero there.")
        return found.probe

    def _calibrate_weights(self) -> None:
        """Chooses the weights of the terms, uses them, and writes them into the recipe of the output folder."""
        args, count = self.args, self.args.calibrate_weights
        batches = self._progress(self._random_batches(count), "Calibrating the weights", count)
        weights = calibrated_weights(
            self.distiller,
            batches,
            count,
            args.learning_rate,
            args.max_grad_norm,
            args.calibration_fraction,
            self._probe_precision,
            self.accelerator.gather,
        )
        self.distiller.loss_weights = weights
        self.announce("Calibrated weights: " + ", ".join(f"{name} {value:.3g}" for name, value in weights.items()))
        if self.is_world_process_zero():
            change_recipe(Path(args.output_dir), {"loss_weights": weights, "calibrate_weights": 0})

    @property
    def _probe_precision(self) -> Precision:
        """The training's autocast; float32 instead of float16, whose gradients would need a scaler."""
        return nullcontext if self.accelerator.mixed_precision == "fp16" else self.accelerator.autocast

    @property
    def weights_are_sharded(self) -> bool:
        """Whether DeepSpeed or FSDP hold parts of the weights on each process."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _random_batches(self, count: int) -> Iterator[dict[str, Any]]:
        """Batches of random training images on the device, different ones on each process."""
        args = self.args
        seed = args.seed * 1000 + args.process_index
        batches = batches_with_boxes(
            self.train_dataset, self.data_collator, args.per_device_train_batch_size, count, seed
        )
        return (self._prepare_inputs(batch) for batch in batches)

    def _progress(self, items: Iterable[Any], title: str, total: int | None = None) -> Iterable[Any]:
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        return tqdm(items, desc=title, total=total, disable=hidden)

    def announce(self, text: str) -> None:
        """Prints on the first process."""
        if self.is_world_process_zero():
            print(text, flush=True)
