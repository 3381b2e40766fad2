"""Registers this package's detectors with transformers' Auto classes lazily.

Importing the detectors takes seconds, so `import hf_detrkd` only adds their model types to `AutoConfig`'s mapping; the
classes are imported and registered when one of them is looked up there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


MODEL_TYPES = ("dino_detr", "faster_rcnn")
AUTO_CONFIGS = "transformers.models.auto.configuration_auto"


def register_classes() -> None:
    """Registers the configs and models with the Auto classes."""
    from transformers import AutoConfig, AutoModelForObjectDetection

    from .dino_detr.modeling_dino_detr import DinoDetrConfig, DinoDetrForObjectDetection
    from .faster_rcnn.modeling_faster_rcnn import FasterRCNNConfig, FasterRCNNForObjectDetection

    classes: list[tuple[Any, Any]] = [
        (DinoDetrConfig, DinoDetrForObjectDetection),
        (FasterRCNNConfig, FasterRCNNForObjectDetection),
    ]
    for config, model in classes:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForObjectDetection.register(config, model, exist_ok=True)


def register_when_needed() -> None:
    """Adds the model types to `AutoConfig`'s mapping, now or right after transformers is imported."""
    if AUTO_CONFIGS in sys.modules:
        add_model_types(sys.modules[AUTO_CONFIGS])
    else:
        sys.meta_path.insert(0, AfterImport(AUTO_CONFIGS, add_model_types))


def add_model_types(configuration_auto: ModuleType) -> None:
    """Adds the model types to `CONFIG_MAPPING` without importing their classes."""
    mapping = configuration_auto.CONFIG_MAPPING
    mapping._extra_content = RegisteredLater(mapping._extra_content)


class RegisteredLater(dict):
    """Config classes by model type; ours are registered when one of them or all entries are read."""

    def __init__(self, registered: dict[str, Any]):
        super().__init__(dict.fromkeys(MODEL_TYPES) | registered)

    def __getitem__(self, model_type: str) -> Any:
        if super().__getitem__(model_type) is None:
            register_classes()
        return super().__getitem__(model_type)

    def __iter__(self) -> Iterator[str]:  # so that a copy reads the entries one by one
        return super().__iter__()

    def values(self) -> Any:
        return [self[model_type] for model_type in self]

    def items(self) -> Any:
        return [(model_type, self[model_type]) for model_type in self]


class AfterImport(MetaPathFinder):
    """Calls a function with a module right after its first import.

    Args:
        name (`str`): full name of the module.
        action (`Callable`)
    """

    def __init__(self, name: str, action: Callable[[ModuleType], None]):
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return None
        execute = loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self.action(module)

        loader.exec_module = execute_and_act
        return spec
