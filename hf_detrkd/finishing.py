"""The end of a run: what its student costs, its pictures, report and card; then the push, where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .comparison import draw_predictions
from .data import DetectionDataset, parse_image_size
from .efficiency import measure_efficiency
from .evaluation import CocoEvaluator
from .hub import HubPush, PushedCommit
from .plots import write_plots
from .recording import rows_of, student_name, write_run_files
from .report import write_report
from .teacher import Teacher
from .tracking import track_pictures


if TYPE_CHECKING:
    from .trainer import DistillationTrainer


logger = logging.get_logger(__name__)
T = TypeVar("T")
PREDICTIONS = "predictions.png"


def finish_run(
    trainer: DistillationTrainer, models: Mapping[str, PreTrainedModel | Teacher] | None = None, measure: bool = True
) -> PushedCommit | HubPush | None:
    """Writes all that a finished run leaves beside its student, and pushes it where `push_to_hub` is set. What cannot
    be measured or drawn is a warning: card and push come in any case.

    Args:
        trainer ([`DistillationTrainer`]): trained and evaluated.
        models (`dict[str, PreTrainedModel | Teacher]`, *optional*): to compare, the student last; default: teacher and
            student.
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
    trainer.save_state()  # of which the curves are drawn
    if trainer.is_world_process_zero():
        compared = models or _models_of(trainer)
        record, folder = trainer.record, Path(trainer.args.output_dir)
        record.models = record.models or rows_of(trainer)
        if isinstance(trainer.compute_metrics, CocoEvaluator):
            record.precision.setdefault(list(record.models)[-1], trainer.compute_metrics.precision)
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            logger.warning("Nothing was measured or drawn with the models: DeepSpeed and FSDP hold them in parts.")
        else:
            if measure:
                _tried("operations and latency", lambda: _measure(trainer, compared))
            if isinstance(trainer.eval_dataset, DetectionDataset):
                _tried(PREDICTIONS, lambda: draw_predictions(compared, trainer.eval_dataset, folder / PREDICTIONS))
        run = write_run_files(trainer)
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
    return student if teacher is None else {"teacher": teacher, **student}


def _measure(trainer: DistillationTrainer, models: Mapping[str, PreTrainedModel | Teacher]) -> None:
    """Adds to each model's row what it costs, at the size of the images that it sees."""
    size = tuple(trainer.eval_dataset[0]["pixel_values"].shape[-2:])
    hidden = trainer.args.disable_tqdm
    for name, model in tqdm(models.items(), desc="Measuring operations and latency", disable=hidden):
        own = parse_image_size(trainer.args.teacher_image_size) if isinstance(model, Teacher) else None
        plain = model.model if isinstance(model, Teacher) else model
        trainer.record.models[name] |= measure_efficiency(plain, own or size)


def _tried(what: str, action: Callable[[], T]) -> T | None:
    """The action's result; where it fails, a warning, since hours of training are behind."""
    try:
        return action()
    except Exception as error:  # memory, fonts, disks, whatever a model's code does
        logger.warning(f"The run's {what} could not be made: {error!r}. Everything else goes on.")
        return None
