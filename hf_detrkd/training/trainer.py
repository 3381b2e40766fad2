"""`DistillationTrainer`: `transformers.Trainer` for detectors, with or without a teacher."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sized
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin, gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from ..adapters import class_names
from ..artifacts.record import Record, figures_row, row_of
from ..artifacts.redaction import forget_machine, shareable, under_home
from ..artifacts.run_folder import STATE, check_output_folder
from ..artifacts.run_lock import run_lock
from ..artifacts.trackers import reopen_trackers
from ..artifacts.whole_checkpoints import publish, resolved_checkpoint, rotate, staging_of
from ..data import DetectionCollator
from ..data.pixels import normalized
from ..distillation.distiller import Distiller
from ..distillation.stored_teacher import StoredTeacher
from ..evaluation import CocoEvaluator, detections_from_predictions, gatherable, references_from_labels
from ..evaluation.efficiency import peak_memory
from ..evaluation.figures import Curves
from ..structures.outputs import Predictions
from ..structures.targets import BatchTotals
from .best_metric import check_best_metric, logged_metric, needs_best_metric
from .build import learning_rates, make_distiller, make_teacher
from .callbacks import AttemptCallback, AverageCallback, BestCheckpointCallback, DatasetEpochCallback
from .checkpoints import load_state, load_student_weights, part_of, save_state
from .compiling import compiled_for
from .config import DistillationConfig
from .ema import StudentAverage
from .finite_guard import FiniteGuard
from .hub_mixin import HubPushMixin
from .item_checks import check_items
from .preflight import first_dataset, first_name
from .preflight_mixin import PreflightMixin
from .prepare_student import checked_args, initialized, prepared_student
from .progress import with_readable_lines
from .run_facts import evaluation_of, facts_of, stored_rows, student_name
from .stopping import StopOnSignal
from .streaming import StreamMixin, with_passes
from .term_watch import TermWatch
from .train_data import check_sizes, check_unlabeled, share_sampler, with_answers


logger = logging.get_logger(__name__)


class DistillationTrainer(PreflightMixin, HubPushMixin, StreamMixin, Trainer):
    """Trains a detector, with or without a teacher.

    A drop-in for [`~transformers.Trainer`]: callbacks, schedulers, accumulation, mixed precision, `report_to`, best
    checkpoint and resuming work as usual. The loss does not depend on how a batch is split over processes and
    micro-batches. COCO mAP is computed in every evaluation without further code.

    Args:
        model ([`~transformers.PreTrainedModel`] or `str`): the student, or its Hub id or folder; with `model_init`
            nothing.
        args ([`DistillationConfig`])
        teacher_model ([`~transformers.PreTrainedModel`] or `str`, *optional*): default:
            `args.teacher_model_name_or_path`.
        method_config (*optional*): options of `args.method`, an instance of its `config_class`, or a list of them for
            several methods. Default: the methods' defaults.
        processing_class (image processor, *optional*): the student's; saved with it.
        teacher_processing_class (image processor, *optional*): the teacher's, for its pixel normalisation. Default:
            loaded with a teacher given by name; the student's for a teacher given as an object.
        train_dataset, eval_dataset, data_collator, compute_metrics and further arguments: as in `Trainer`. Items are
            dicts of `pixel_values`, optional `pixel_mask`, and `labels` with `class_labels`, `boxes`, and for
            evaluation `image_id` and `orig_size`. The training set may be a [`~hf_detrkd.data.DetectionStream`], or a
            `datasets.IterableDataset` of such items, whose passes follow each other without an end.

    Raises:
        ValueError: a method without a teacher or the reverse; a pair of models that the method does not support; an
            `output_dir` that is the folder of one of the models; a stream without `max_steps`.

    Example:
        ```python
        >>> trainer = DistillationTrainer(
        ...     model=student,
        ...     teacher_model="PekingU/rtdetr_r50vd",
        ...     args=DistillationConfig("out", method="kd_detr"),
        ...     train_dataset=train,
        ...     eval_dataset=val,
        ...     processing_class=processor,
        ... )
        >>> trainer.train()
        ```
    """

    loss_is_scaled_for_ga = False  # the loss is a mean over the micro-batch: Trainer divides by their number
    _tag_names = ("hf-detrkd", "knowledge-distillation", "object-detection")

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        args: DistillationConfig | None = None,
        teacher_model: PreTrainedModel | str | None = None,
        method_config: Any = None,
        processing_class: Any = None,
        teacher_processing_class: Any = None,
        data_collator: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        args = checked_args(args)
        model_init = kwargs.pop("model_init", None)
        if model_init is not None:
            if model is not None:
                raise ValueError("Give either model or model_init, not both.")
            model = initialized(model_init)
        student = prepared_student(model, args, teacher_model)
        teacher = make_teacher(student, args, teacher_model, processing_class, teacher_processing_class)
        sources = {"student": student.config.name_or_path, "teacher": None if teacher is None else teacher.origin.name}
        check_output_folder(args.output_dir, sources)
        self._method_config = method_config
        kwargs["train_dataset"] = with_passes(kwargs.get("train_dataset"), kwargs.get("eval_dataset"), args)
        distiller = make_distiller(student, teacher, args, method_config)
        if isinstance(teacher, StoredTeacher):
            methods: list[Any] = list(distiller.methods.values())
            kwargs["train_dataset"] = with_answers(kwargs.get("train_dataset"), teacher, methods, args)
        check_sizes([kwargs.get("train_dataset"), first_dataset(kwargs.get("eval_dataset"))], distiller)
        self.record = Record()
        first = first_name(kwargs.get("eval_dataset"))
        self._metric_is_asked = args.metric_for_best_model != "map"
        if first is not None and not self._metric_is_asked:  # Trainer logs a map of each
            args.metric_for_best_model = f"eval_{first}_map"
        self._curves: Curves = {}
        args.batch_eval_metrics = compute_metrics is None or args.batch_eval_metrics
        super().__init__(
            model=distiller,
            args=args,
            processing_class=processing_class,
            data_collator=data_collator or DetectionCollator(),
            compute_metrics=compute_metrics or CocoEvaluator(dict(enumerate(class_names(student.config)))),
            callbacks=[
                DatasetEpochCallback(),
                BestCheckpointCallback(),
                AttemptCallback(self._begin_attempt),
                *(callbacks or []),
                stop := StopOnSignal(),
            ],
            **kwargs,
        )
        self._stop = stop
        self.model_init = model_init  # for hyperparameter_search
        if teacher is not None:
            teacher.to(args.device)
        with_readable_lines(self)
        self._guard = FiniteGuard()
        self._average: StudentAverage | None = None
        self._trained: dict[str, Tensor] | None = None  # gathered from all processes while a sharded student is saved
        self._follow(distiller)
        self._parts: dict[str, Tensor] = {}
        self._images_seen = 0
        self._log_time = time.perf_counter()
        self._log_step = 0
        self._first_step: int | None = None
        self._evaluation_seconds = 0.0
        self._staging: Path | None = None
        self._finished: Path | None = None  # the folder of a finished run, whose student this is

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`; the metrics also hold `train_seconds_per_step`, without the time of evaluations.

        `resume_from_checkpoint=True` goes on from the last whole checkpoint.

        Raises:
            ValueError: the checkpoint to resume from is not whole, or there is none.
            RunStopped: SIGTERM or Ctrl-C came; a checkpoint was saved first.
        """
        checkpoint = resolved_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            self.announce(f"Going on from {under_home(checkpoint)}.")
        self._first_step = self._finished = None
        check_unlabeled(self.train_dataset, self.distiller)
        self.get_optimizer_cls_and_kwargs(self.args)  # says now if a package is missing
        classes = len(class_names(self.student.config))
        check_items(self.train_dataset, "train_dataset", classes)
        if type(self.compute_metrics) is CocoEvaluator:
            check_best_metric(self.args, self.eval_dataset, self.student.config.id2label, self._metric_is_asked)
        self._guard = FiniteGuard()  # an interrupted run may have left losses in the old one
        self._preflight(resumes=checkpoint is not None)
        # An evaluation before training marks the student as prepared, and accelerate would then skip DDP.
        vars(self.distiller).pop("_is_accelerate_prepared", None)
        self._log_time = started = time.perf_counter()
        self._evaluation_seconds = 0.0
        try:
            with run_lock(self.args.output_dir, self.is_world_process_zero()), compiled_for(self.args, self.distiller):
                output = super().train(checkpoint, *args, **kwargs)
        finally:
            self._stop.restore()
        reopen_trackers(self)
        self._guard.settle(self.student)
        if self._average is not None:
            self._average.adopt()
        seconds = time.perf_counter() - started - self._evaluation_seconds
        steps = max(1, self.state.global_step - (self._first_step or 0))
        return output._replace(metrics=output.metrics | {"train_seconds_per_step": seconds / steps})

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`; but what `torch_compile` compiles are pieces: see [`compiled_for`].

        Raises:
            ValueError: FSDP of version 1, stage 3 of DeepSpeed, or `ema_decay` with DeepSpeed.
        """
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError("DistillationTrainer needs FSDP2: set fsdp_version to 2 in accelerate's configuration.")
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "ZeRO stage 3 of DeepSpeed shards every model that is loaded, the teacher, too: set stage 1 or 2, or "
                "use FSDP2."
            )
        if self.args.ema_decay is not None and self.is_deepspeed_enabled:
            raise ValueError(
                "ema_decay cannot be used with DeepSpeed, which keeps the weights itself: use FSDP or DDP."
            )
        chosen = TorchDynamoPlugin()  # by `accelerate launch --dynamo_backend`
        if chosen.backend != DynamoBackend.NO and not self.args.torch_compile:
            self.args.torch_compile, self.args.torch_compile_mode = True, chosen.mode
            self.args.torch_compile_backend = chosen.backend.value.lower()
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        if self.is_fsdp_enabled:  # a student is one file, whatever held its shards
            plugin = self.accelerator.state.fsdp_plugin
            plugin.state_dict_config = plugin.optim_state_dict_config = None  # or those of the former type stay
            plugin.set_state_dict_type("FULL_STATE_DICT")

    def call_model_init(self, trial: Any = None) -> Distiller:
        """A new student for a trial of `hyperparameter_search`, in a distiller of its own."""
        student = initialized(self.model_init, trial)
        teacher = self.distiller.teacher
        self.model = make_distiller(prepared_student(student, self.args), teacher, self.args, self._method_config)
        self._follow(self.model)
        return self.model

    def _follow(self, distiller: Distiller) -> None:
        """Measures and averages this student from now on, by the schedules of the arguments."""
        self._schedules = self.args.schedules()
        self._watch = TermWatch(distiller, self.args.gradient_ratio_steps)
        if self.args.ema_decay is not None:
            self.pop_callback(AverageCallback)
            self._average = StudentAverage(distiller.student, self.args.ema_decay, distiller)
            self.add_callback(AverageCallback(self._average))

    def _begin_attempt(self) -> None:
        """Forgets what a failed attempt of `auto_find_batch_size` has counted."""
        self._parts, self._images_seen, self._first_step = {}, 0, None
        self._log_time = time.perf_counter()
        self._guard = FiniteGuard()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As in `Trainer`; with unlabelled images every batch has its share of them."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return share_sampler(dataset, self.args, self._train_batch_size) or super()._get_train_sampler(train_dataset)

    # --- one step ----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Adds to every micro-batch its loss normalisers: counts over all processes and micro-batches."""
        if self._first_step is None:
            self._first_step = self._log_step = self.state.global_step
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        queries = self.distiller.adapter.spec.num_queries
        labels = [label for batch in batches for label in batch["labels"]]
        totals = BatchTotals.counted(labels, queries, max(1, len(batches)))
        if device.type == "cuda":
            totals = totals.pin_memory()
        totals = totals.to(device, non_blocking=True)
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        totals = torch.cat([totals[:, :-1] / totals[:, -1:], totals[:, -1:]], 1)
        self._images_seen += len(labels) * self.args.world_size
        return [{**batch, "totals": totals} for batch in batches], num_items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        step = self.state.global_step
        factor, last = self.args.distillation_weight, self.state.max_steps
        weights = {name: factor * schedule(step, last) for name, schedule in self._schedules.items()}
        if self.model.training and not self.weights_are_sharded:
            started = time.perf_counter()
            if self._watch.look(step, inputs, weights, self._probe_precision):
                self._leave_out(time.perf_counter() - started)
        outputs = model(inputs, step=step, distillation_weights=weights)
        if self.model.training:
            self._guard.watch(step, outputs["terms"], inputs["labels"])
            for name, value in outputs["parts"].items():
                self._parts[name] = self._parts.get(name, 0) + value / self.current_gradient_accumulation_steps
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in `Trainer`, with separate parameter groups for parameters that have their own learning rate."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        rates = {} if given else learning_rates(self.distiller.adapter, self.args)
        for group in list(optimizer.param_groups):
            own: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if id(parameter) in rates:
                    own.setdefault(rates[id(parameter)], []).append(parameter)
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in rates]
            for rate, chosen in own.items():
                optimizer.add_param_group({**group, "params": chosen, "lr": rate})
        return optimizer

    # --- logging -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a training log the mean of every part of the loss, the throughput and the peak memory."""
        steps = self.state.global_step - self._log_step
        if "loss" in logs and steps:
            logs |= self._mean_parts(steps)
            logs["images_per_second"] = round(self._images_seen / (time.perf_counter() - self._log_time), 2)
            logs["peak_memory_gb"] = round(peak_memory(self.args.device), 3)
            self._parts, self._images_seen, self._log_step = {}, 0, self.state.global_step
            self._log_time = time.perf_counter()
        super().log(logs, start_time)

    def _mean_parts(self, steps: int) -> dict[str, float]:
        if not self._parts:
            return {}
        values = (torch.stack(list(self._parts.values())) / steps).tolist()
        # By name: a process whose images had no box has no denoising parts.
        everyone = gather_object([dict(zip(self._parts, values, strict=True))])
        names = dict.fromkeys(name for parts in everyone for name in parts)
        means = {name: sum(parts.get(name, 0.0) for parts in everyone) / len(everyone) for name in names}
        return {str(name): value for name, value in means.items()} | self._watch.entries(means)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`; resets the metric first, which an interrupted evaluation may have left filled."""
        given = kwargs.get("eval_dataset", args[0] if args else None)
        name, data = "eval_dataset", self.eval_dataset if given is None else given
        if isinstance(data, dict):
            return super().evaluate(*args, **kwargs)  # comes here again with each set
        if isinstance(data, str):
            name, data = f"eval_dataset[{data!r}]", self.eval_dataset[data]
        if isinstance(self.compute_metrics, CocoEvaluator):
            self.compute_metrics.reset()
        check_items(data, name, len(class_names(self.student.config)), not self.args.prediction_loss_only)
        started = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._leave_out(time.perf_counter() - started)
        if isinstance(self.compute_metrics, CocoEvaluator) and first_name(self.eval_dataset) in (None, given):
            self._curves = self.compute_metrics.precision
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As in `Trainer`; `compute_metrics` of one's own need no `map` if no best checkpoint is wanted."""
        asked = self._metric_is_asked or needs_best_metric(self.args)
        if not asked and logged_metric(str(self.args.metric_for_best_model)) not in metrics:
            return False
        return bool(super()._determine_best_metric(metrics, trial))

    def _leave_out(self, seconds: float) -> None:
        """Takes a time in which nothing was trained out of the throughput."""
        self._evaluation_seconds += seconds
        self._log_time += seconds

    def _averaged(self) -> AbstractContextManager[None]:
        """Context in which the student has its EMA weights, if there are any."""
        return nullcontext() if self._average is None else self._average.in_place()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, with the student's EMA weights if there are any."""
        with self._averaged():
            return super().evaluation_loop(*args, **kwargs)

    # --- the record --------------------------------------------------------------------------------------------------

    def fill_record(self) -> None:
        """Adds the trainer's own facts of the run and the metrics of teacher and student to the record."""
        datasets = self.train_dataset, first_dataset(self.eval_dataset)
        precision, push = self.accelerator.mixed_precision, self.push_in_progress
        self.record.add_facts(facts_of(self.args, self.distiller, *datasets, precision, push))
        self.record.add_facts({"steps": self.state.global_step})
        teacher, whole = self.distiller.teacher, datasets[1]
        if isinstance(teacher, StoredTeacher):
            for name, row in stored_rows(teacher, whole, self.student.config.id2label).items():
                self.record.add_model(name, row)
        elif teacher is not None:
            seen = self.args.teacher_check_samples
            sampled = seen and isinstance(whole, Sized) and seen < len(whole)  # not the student's images
            found = {} if sampled else self.teacher_metrics or {}
            figures = {n.removeprefix("teacher_"): v for n, v in found.items()}
            row = figures_row(self.student.config.id2label, teacher.num_parameters, figures)
            self.record.add_model("teacher", row)
        metrics = evaluation_of(self.state, self.args.load_best_model_at_end, first_name(self.eval_dataset))
        row = row_of(self.student, {n.removeprefix("eval_"): v for n, v in metrics.items()})
        self.record.add_model(student_name(self.args), row, self._curves)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device, pixels become floats."""
        return normalized(super()._prepare_inputs(inputs))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, the best detections of every image, and the ground truth, both in pixels of the original."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            outputs = model(inputs)
        spec = self.distiller.adapter.spec
        answers = Predictions(outputs["logits"], outputs["pred_boxes"], activation=spec.activation)
        if prediction_loss_only:
            return outputs["loss"], None, None
        sizes = torch.stack([label["orig_size"] for label in inputs["labels"]])
        detections = detections_from_predictions(answers, sizes, self.args.max_detections or spec.max_detections)
        return outputs["loss"], *gatherable(detections, references_from_labels(inputs["labels"]))

    # --- saving ------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, with the student's EMA weights if there are any."""
        if self._average is None or not self.weights_are_sharded:
            super().save_model(output_dir, _internal_call)
            return
        # All processes gather both, the trained weights first.
        self._trained = self.accelerator.get_state_dict(self.model)
        try:
            with self._averaged():
                super().save_model(output_dir, _internal_call)
        finally:
            self._trained = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Saves the student for `from_pretrained`; in a checkpoint also the state needed to resume."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if folder.resolve() == self._finished:
            return  # it holds this student
        folder.mkdir(parents=True, exist_ok=True)
        distiller = self.distiller
        weights = state_dict or distiller.state_dict()
        with self._averaged() if self._trained is None else nullcontext():  # gathered weights are already averaged
            distiller.student.save_pretrained(folder, state_dict=part_of(weights, "student."))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(shareable(self.args), folder / TRAINING_ARGS_NAME)
        if folder.resolve() != Path(self.args.output_dir).resolve():
            save_state(distiller, self._average, folder, self._trained or weights)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As in `Trainer`, but whole or not at all; raises before writing anything if a loss or a weight is not
        finite."""
        self._guard.settle(self.student)
        folder = Path(super()._get_output_dir(trial))
        staged = staging_of(folder) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        final = folder / staged.name
        if self.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)  # of a run that was killed
        self._staging = staged.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            forget_machine(staged / STATE)
            publish(staged, final)
            rotate(folder, self.args.save_total_limit, [final, Path(self.state.best_model_checkpoint or final)])
            if self.args.push_to_hub:
                self.push_checkpoint(final)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        """As in `Trainer`; while a checkpoint is written, the folder in which it is written."""
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads student and projections; `Trainer` loads the rest of a checkpoint."""
        folder = Path(resume_from_checkpoint)
        if not self.is_deepspeed_enabled and not any(folder.glob("optimizer*")):
            logger.warning(
                f"{folder.name} holds no state of the optimizer (save_only_model): its moments and the learning-rate "
                "schedule start anew."
            )
        self._load_checkpoint(folder)

    def _load_checkpoint(self, folder: Path) -> None:
        load_student_weights(self.student, folder)
        calibrated = self.args.loss_weights is None or self.args.calibration_steps > 0
        load_state(self.distiller, self._average, folder, calibrated)

    def load_student(self, folder: Path) -> None:
        """Loads a finished student from its run's output folder; with `ema_decay` the saved weights are the EMA
        weights, from which the average restarts.

        Args:
            folder (`Path`): holds `model.safetensors`.
        """
        load_student_weights(self.student, folder)
        self._finished = folder.resolve()
        if self._average is not None:
            self._average.restart()

    def _load_best_model(self) -> None:
        logger.info(f"Loading the best student from {self.state.best_model_checkpoint} ({self.state.best_metric}).")
        assert self.state.best_model_checkpoint is not None
        self._load_checkpoint(Path(self.state.best_model_checkpoint))  # and its EMA, if there is one
