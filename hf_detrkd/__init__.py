"""Distillation of detection transformers with `transformers.Trainer`.

Public names are imported when they are first used: `import hf_detrkd` itself loads neither torch nor transformers.
"""

from typing import TYPE_CHECKING

import lazy_loader

from .models.registration import register_when_needed


__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules={
        "adapters",
        "answers",
        "artifacts",
        "cli",
        "data",
        "distillation",
        "evaluation",
        "export",
        "losses",
        "methods",
        "models",
        "structures",
        "training",
    },
    submod_attrs={
        "adapters": ["ADAPTERS", "DetectorAdapter"],
        "distillation.distiller": ["Distiller"],
        "distillation.teacher": ["Teacher"],
        "evaluation": ["CocoBoxMetric"],
        "methods": [
            "CLoCKDistill",
            "CLoCKDistillConfig",
            "DETRDistill",
            "DETRDistillConfig",
            "DistillationMethod",
            "ExtraQueriesConfig",
            "KDDETR",
            "KDDETRConfig",
            "METHODS",
            "TaskAdaptiveConfig",
            "TaskAdaptiveRegularization",
        ],
        "models": [
            "DinoDetrConfig",
            "DinoDetrForObjectDetection",
            "FasterRCNNConfig",
            "FasterRCNNForObjectDetection",
        ],
        "structures.loss_key": ["LossKey"],
        "structures.outputs": ["DetectorOutput", "ObjectQueries", "Predictions"],
        "training.config": ["DistillationConfig"],
        "training.finish": ["finish_run"],
        "training.trainer": ["DistillationTrainer"],
    },
)

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from .adapters import ADAPTERS as ADAPTERS
    from .adapters import DetectorAdapter as DetectorAdapter
    from .distillation.distiller import Distiller as Distiller
    from .distillation.teacher import Teacher as Teacher
    from .evaluation import CocoBoxMetric as CocoBoxMetric
    from .methods import KDDETR as KDDETR
    from .methods import METHODS as METHODS
    from .methods import CLoCKDistill as CLoCKDistill
    from .methods import CLoCKDistillConfig as CLoCKDistillConfig
    from .methods import DETRDistill as DETRDistill
    from .methods import DETRDistillConfig as DETRDistillConfig
    from .methods import DistillationMethod as DistillationMethod
    from .methods import ExtraQueriesConfig as ExtraQueriesConfig
    from .methods import KDDETRConfig as KDDETRConfig
    from .methods import TaskAdaptiveConfig as TaskAdaptiveConfig
    from .methods import TaskAdaptiveRegularization as TaskAdaptiveRegularization
    from .models import DinoDetrConfig as DinoDetrConfig
    from .models import DinoDetrForObjectDetection as DinoDetrForObjectDetection
    from .models import FasterRCNNConfig as FasterRCNNConfig
    from .models import FasterRCNNForObjectDetection as FasterRCNNForObjectDetection
    from .structures.loss_key import LossKey as LossKey
    from .structures.outputs import DetectorOutput as DetectorOutput
    from .structures.outputs import ObjectQueries as ObjectQueries
    from .structures.outputs import Predictions as Predictions
    from .training.config import DistillationConfig as DistillationConfig
    from .training.finish import finish_run as finish_run
    from .training.trainer import DistillationTrainer as DistillationTrainer

register_when_needed()  # AutoModelForObjectDetection knows this package's detectors
