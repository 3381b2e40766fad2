"""Post-training steps: benchmarks the student, draws plots, writes report and model card, optionally pushes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..artifacts.html_report import write_report
from ..artifacts.hub.background_push import HubPush, PushedCommit
from ..artifacts.plots import write_plots
from ..artifacts.prediction_grid import draw_predictions
from ..artifacts.trackers import track_pictures
from ..data import DetectionDataset, parse_image_size
from ..distillation.prediction import predictor
from ..distillation.teacher import Teacher
from ..evaluation.efficiency import measure_efficiency
from .preflight import first_dataset
from .run_facts import student_name


if TYPE_CHECKING:
    from .trainer import DistillationTrainer


logger = logging.get_logger(__name__)
T = TypeVar("T")
PREDICTIONS = "predictions.png"


def finish_run(
    trainer: DistillationTrainer, models: Mapping[str, PreTrainedModel | Teacher] | None = None, measure: bool = True
) -> PushedCommit | HubPush | None:
    """Writes the measurements, plots, report and card of a finished run, and pushes it if `push_to_hub` is set. A
    failing measurement or plot is only a warning: the card is written in any case.

    Args:
        trainer ([`DistillationTrainer`]): trained and evaluated.
        models (`dict[str, PreTrainedModel | Teacher]`, *optional*): models to compare, the student last;
            default: teacher and student.
        measure (`bool`): time forward passes and count their operations.

    Returns:
        What [`DistillationTrainer.push_to_hub`] returns; `None` without a push.

    Example:
        ```python
        >>> trainer.train()
        >>> trainer.evaluate()
        >>> finish_run(trainer)
        ```
    """
    trainer.save_state()  # the curves are drawn from it
    trainer.fill_record()
    if trainer.is_world_process_zero():
        _add_measurements(trainer, models or _models_of(trainer), measure)
        folder = Path(trainer.args.output_dir)
        run = trainer.record.write(folder)
        pictures = _tried("plots", lambda: write_plots(run)) or []
        track_pictures(trainer, [folder / PREDICTIONS, *pictures])
        _tried("report", lambda: write_report(run))
    if trainer.args.push_to_hub:
        return trainer.push_to_hub()  # which writes the card
    trainer.create_model_card()
    return None


def _models_of(trainer: DistillationTrainer) -> dict[str, PreTrainedModel | Teacher]:
    teacher = trainer.distiller.teacher
    student = {student_name(trainer.args): trainer.student}
    return {"teacher": teacher, **student} if isinstance(teacher, Teacher) else student


def _add_measurements(
    trainer: DistillationTrainer, models: Mapping[str, PreTrainedModel | Teacher], measure: bool
) -> None:
    """Measures the models' cost and draws their predictions."""
    if trainer.weights_are_sharded:
        logger.warning("Latency and predictions are skipped: DeepSpeed and FSDP shard the weights.")
        return
    if measure:
        _tried("operations and latency", lambda: _measure(trainer, models))
    data = first_dataset(trainer.eval_dataset)
    if isinstance(data, DetectionDataset):
        predictors = {name: predictor(model, data) for name, model in models.items()}
        file = Path(trainer.args.output_dir) / PREDICTIONS
        _tried(PREDICTIONS, lambda: draw_predictions(predictors, data, file))


def _measure(trainer: DistillationTrainer, models: Mapping[str, PreTrainedModel | Teacher]) -> None:
    """Adds each model's cost to its row, measured at its own image size."""
    size = tuple(first_dataset(trainer.eval_dataset)[0]["pixel_values"].shape[-2:])
    hidden = trainer.args.disable_tqdm
    for name, model in tqdm(models.items(), desc="Measuring operations and latency", disable=hidden):
        own = parse_image_size(trainer.args.teacher_image_size) if isinstance(model, Teacher) else None
        plain = model.model if isinstance(model, Teacher) else model
        trainer.record.add_model(name, measure_efficiency(plain, own or size))


def _tried(what: str, action: Callable[[], T]) -> T | None:
    """The action's result; a failure is only a warning, since the training itself succeeded."""
    try:
        return action()
    except Exception as error:  # memory, fonts, disks, whatever a model's code does
        logger.warning(f"The run's {what} could not be created: {error!r}. The remaining steps continue.")
        return None
