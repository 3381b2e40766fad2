"""Runs the pre-training checks of the trainer, and prints and stores their results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..artifacts.record import Record
from ..artifacts.run_folder import change_recipe
from ..data import DetectionDataset, DetectionStream, RowStream
from ..data.faults import check_boxes
from ..distillation.distiller import Distiller
from ..distillation.prediction import evaluate_teacher
from ..distillation.stored_teacher import StoredTeacher
from ..distillation.teacher import Teacher
from .loss_probe import Precision, Probe
from .preflight import (
    PROBED,
    batches_with_boxes,
    calibrated_weights,
    check_teacher,
    check_view,
    first_batches,
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
    """Pre-training checks for a `Trainer`; must come before `Trainer` in the base classes."""

    args: Any
    record: Record
    teacher_metrics: dict[str, float] | None = None  # set by [`check_teacher`]

    @property
    def distiller(self) -> Distiller:
        """The trained module, without wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def student(self) -> PreTrainedModel:
        """The plain student model, without wrappers."""
        return self.distiller.student

    def evaluate_teacher(self, dataset: Any = None) -> dict[str, float]:
        """COCO metrics of the teacher, on images as it gets them in training; all processes must call it.

        Args:
            dataset (*optional*): default: the evaluation set, of several the first.

        Raises:
            ValueError: the run has no teacher.
        """
        teacher, args = self.distiller.teacher, self.args
        if teacher is None:
            raise ValueError("This run has no teacher to evaluate: it trains with --method none.")
        whole = first_dataset(self.eval_dataset)
        if isinstance(teacher, StoredTeacher):
            return stored_metrics(teacher, whole if dataset is None else dataset, self.student.config.id2label)
        dataset = first_dataset(self.eval_dataset) if dataset is None else dataset
        if dataset is None:
            raise ValueError("The teacher is evaluated on a data set with a length: give one, or an eval_dataset.")
        mine = Subset(dataset, range(args.process_index, len(dataset), args.world_size))
        loader = DataLoader(
            mine, args.eval_batch_size, collate_fn=self.data_collator, num_workers=args.dataloader_num_workers
        )
        batches = (self._prepare_inputs(batch) for batch in self._progress(loader, "Evaluating the teacher"))
        metrics, curves = evaluate_teacher(teacher, batches, self.student.config.id2label, args.max_detections)
        if curves is not None:
            self.record.precision["teacher"] = curves
        return metrics

    def _preflight(self, resumes: bool) -> None:
        """Runs all checks that the arguments enable, in order; a resumed run was checked when it started.

        Raises:
            ValueError: the teacher is too weak, its images are missing, or a loss term has no effect.
        """
        args, distiller = self.args, self.distiller
        if isinstance(self.train_dataset, DetectionDataset):
            check_boxes(self.train_dataset)
        elif isinstance(self.train_dataset, DetectionStream):
            check_boxes(self.train_dataset.head())
        if not distiller.methods or not args.distillation_weight:
            return
        if distiller.teacher is not None:
            for one in distiller.teacher.members:
                self.announce(one.class_map.table())
        if resumes:
            return
        self.check_teacher()
        if not (args.calibration_steps or args.probe):
            return
        if self.weights_are_sharded or not isinstance(self.train_dataset, Sized | RowStream):
            reason = "DeepSpeed and FSDP shard the weights" if self.weights_are_sharded else "a stream has no length"
            logger.warning(f"The loss terms are neither probed nor calibrated before this run: {reason}.")
            return
        self.student.to(args.device)
        if args.teacher_image_size is not None and isinstance(distiller.teacher, Teacher):
            check_view(next(self._random_batches(1)), args.teacher_image_size)
        if args.calibration_steps:
            self._calibrate_weights()
        if args.probe:
            self.probe_losses()

    def check_teacher(self) -> None:
        """Evaluates the teacher once, on images spread over the evaluation set; the metrics are saved in
        `teacher_results.json`.

        Raises:
            ValueError: its mAP over the classes it knows is below `min_teacher_map`.
        """
        args, teacher = self.args, self.distiller.teacher
        if teacher is None or args.min_teacher_map <= 0 or self.teacher_metrics is not None:
            return
        dataset = first_dataset(self.eval_dataset)
        if dataset is None:
            logger.warning("The teacher is not checked: there is no evaluation set with a length.")
            return
        if isinstance(teacher, StoredTeacher):
            for name, one in teacher.by_name().items():
                metrics = one.metrics(dataset, self.student.config.id2label)
                if metrics is None:
                    logger.warning(f"The {name} is not checked: its answers have no metrics on this evaluation set.")
                else:
                    self._check(name, one, metrics, len(dataset))
            return
        sample = spread_sample(dataset, args.teacher_check_samples)
        self.teacher_metrics = self.evaluate_teacher(sample)
        self._check("teacher", teacher, self.teacher_metrics, len(sample))

    def _check(self, name: str, teacher: Teacher | StoredTeacher, metrics: dict[str, float], images: int) -> None:
        """Saves the metrics of a teacher, and compares its mAP with `min_teacher_map`."""
        self.save_metrics(name.replace(" ", "_"), metrics, combined=False)
        verdict = check_teacher(teacher, metrics, self.student.config.id2label, images, self.args.min_teacher_map)
        if verdict is None:
            logger.warning(f"The {name} is not checked: none of {images} evaluation images contains its classes.")
        else:
            self.announce(verdict)

    def probe_losses(self) -> Probe:
        """Measures the value and gradient norm of every loss term on a batch and prints the table.

        Raises:
            ValueError: a term is not finite, or in the first batches it is zero, has no gradient to the student or
                one that is too large.
        """
        batches = self._random_batches(PROBED)
        found = probe_terms(self.distiller, batches, self._probe_precision, self.args.max_gradient_ratio)
        self.announce(found.probe.table())
        if found.silent:  # the teacher may be nowhere better in a few images
            names = ", ".join(found.silent)
            logger.warning(f"No element of {names} passed the gate in the first batches: these losses are zero there.")
        return found.probe

    def _calibrate_weights(self) -> None:
        """Calibrates the loss weights, applies them, and writes them to the recipe of the output folder."""
        args, count = self.args, self.args.calibration_steps
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
        """True if DeepSpeed or FSDP shards the weights across processes."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _random_batches(self, count: int) -> Iterator[dict[str, Any]]:
        """Batches of random training images on the device, different for each process; of a stream the first ones."""
        args, data, size = self.args, self.train_dataset, self.args.per_device_train_batch_size
        if isinstance(data, RowStream):
            batches = first_batches(data, self.data_collator, size, count, args.process_index, args.world_size)
        else:
            seed = args.seed * 1000 + args.process_index
            batches = batches_with_boxes(data, self.data_collator, size, count, seed)
        return (self._prepare_inputs(batch) for batch in batches)

    def _progress(self, items: Iterable[Any], title: str, total: int | None = None) -> Iterable[Any]:
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        return tqdm(items, desc=title, total=total, disable=hidden)

    def announce(self, text: str) -> None:
        """Prints on the first process."""
        if self.is_world_process_zero():
            print(text, flush=True)


def stored_metrics(teacher: StoredTeacher, dataset: Any, id2label: Mapping[int, str]) -> dict[str, float]:
    """The metrics that were measured when the answers were stored.

    Raises:
        ValueError: they were not.
    """
    found = teacher.metrics(dataset, id2label)
    if found is None:
        raise ValueError(
            f"The answers of {teacher.origin.name} come without metrics of the teacher on this evaluation set."
        )
    return found
