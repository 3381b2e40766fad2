"""Makes transformers' Auto classes know this package's detectors without importing either.

Importing the detectors takes seconds, so `import hf_detrkd` only leaves their model types in the mappings of the Auto
classes; the classes are imported and registered when one of them is looked up there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


MODEL_TYPES = ("dino_detr", "faster_rcnn")


def register_classes() -> None:
    """Registers configs and models with the Auto classes, except model types that somebody else has registered."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForObjectDetection

    from .dino_detr.modeling_dino_detr import DinoDetrConfig, DinoDetrForObjectDetection
    from .faster_rcnn.modeling_faster_rcnn import FasterRCNNConfig, FasterRCNNForObjectDetection

    classes: list[tuple[Any, Any]] = [
        (DinoDetrConfig, DinoDetrForObjectDetection),
        (FasterRCNNConfig, FasterRCNNForObjectDetection),
    ]
    for config, model in classes:
        if dict.get(CONFIG_MAPPING._extra_content, config.model_type) in (None, config):
            AutoConfig.register(config.model_type, config, exist_ok=True)
            AutoModelForObjectDetection.register(config, model, exist_ok=True)


class ConfigsRegisteredLater(dict):
    """Config classes by model type; ours are registered when one of them, or all entries, are read."""

    def __init__(self, registered: dict[str, Any]):
        super().__init__(dict.fromkeys(MODEL_TYPES) | registered)

    def __getitem__(self, model_type: str) -> Any:
        if super().__getitem__(model_type) is None:
            register_classes()
        return super().__getitem__(model_type)

    def __iter__(self) -> Iterator[str]:  # so that a copy reads the entries one by one
        return super().__iter__()

    def get(self, model_type: str, default: Any = None) -> Any:
        return self[model_type] if model_type in self else default  # noqa: SIM401  # this is `get`

    def values(self) -> Any:
        return [self[model_type] for model_type in self]

    def items(self) -> Any:
        return [(model_type, self[model_type]) for model_type in self]


class ModelsRegisteredLater(dict):
    """Model classes by config class; ours are registered when a config of ours is looked up."""

    def __contains__(self, config_class: object) -> bool:
        ours = getattr(config_class, "model_type", None) in MODEL_TYPES
        if ours and not super().__contains__(config_class):
            register_classes()
        return super().__contains__(config_class)


def add_configs(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, ConfigsRegisteredLater):
        mapping._extra_content = ConfigsRegisteredLater(mapping._extra_content)


def add_models(module: ModuleType) -> None:
    mapping = module.MODEL_FOR_OBJECT_DETECTION_MAPPING
    if not isinstance(mapping._extra_content, ModelsRegisteredLater):
        mapping._extra_content = ModelsRegisteredLater(mapping._extra_content)


ACTIONS = {
    "transformers.models.auto.configuration_auto": add_configs,
    "transformers.models.auto.modeling_auto": add_models,
}


def register_when_needed() -> None:
    """Extends the mappings of the Auto classes, now or right after transformers' modules are imported."""
    for name, action in ACTIONS.items():
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            action(module)
    sys.meta_path.insert(0, AfterImport(ACTIONS))


class AfterImport(MetaPathFinder):
    """Calls functions with modules right after these are imported.

    Args:
        actions (`dict[str, Callable]`): functions by the full names of modules.
    """

    def __init__(self, actions: Mapping[str, Callable[[ModuleType], None]]):
        self.actions = actions

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in self.actions else None
        if spec is not None and spec.loader is not None:
            spec.loader = ActingLoader(spec.loader, self.actions[fullname])
        return spec


class ActingLoader(Loader):
    """A loader that calls a function with its module after it was executed."""

    def __init__(self, loader: Loader, action: Callable[[ModuleType], None]):
        self.loader, self.action = loader, action

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.action(module)
