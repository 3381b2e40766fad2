"""The metric that selects the best checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from transformers.trainer_utils import SaveStrategy

from ..evaluation import class_figures
from ..evaluation.figures import FIGURES
from .config import DistillationConfig


def logged_metric(name: str) -> str:
    """A metric by the name under which `Trainer` logs and looks for it."""
    return name if name.startswith("eval_") else f"eval_{name}"


def needs_best_metric(args: DistillationConfig) -> bool:
    """Whether a run cannot do without `metric_for_best_model`."""
    best = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST
    return best or args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")


def check_best_metric(args: DistillationConfig, eval_dataset: Any, id2label: Mapping[int, str], asked: bool) -> None:
    """Checks the metric of the best checkpoint before a run that evaluates by COCO's metrics. A name that resembles
    none of theirs may be that of a callback.

    Args:
        args ([`DistillationConfig`])
        eval_dataset: one set, or several by name.
        id2label (`dict[int, str]`): the student's classes.
        asked (`bool`): the metric is not the default.

    Raises:
        ValueError: the evaluation has no such metric.
    """
    if args.eval_strategy == "no" or args.metric_for_best_model is None or not (asked or needs_best_metric(args)):
        return
    sets = [f"{one}_" for one in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    known = [f"{one}{figure}" for one in sets for figure in ("loss", *FIGURES, *class_figures(id2label).values())]
    there = [name for name in known if name.endswith("loss")] if args.prediction_loss_only else known
    given = args.metric_for_best_model.removeprefix("eval_")
    if given not in there and (given in known or difflib.get_close_matches(given.lower(), known, 1, 0.75)):
        raise ValueError(
            f"metric_for_best_model is {args.metric_for_best_model!r}, but the evaluation has {', '.join(there)}"
            f"{', because of prediction_loss_only' if args.prediction_loss_only else ''}: set one of them."
        )
