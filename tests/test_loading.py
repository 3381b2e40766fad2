"""Lazy imports: nothing heavy before it is used, and every public name when it is."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import CONFIG_MAPPING, DetrConfig

import hf_detrkd
from hf_detrkd import FasterRCNNConfig
from hf_detrkd.models.registration import AfterImport, ConfigsRegisteredLater, ModelsRegisteredLater
from tests import ROOT


HEAVY = {"accelerate", "datasets", "evaluate", "faster_coco_eval", "huggingface_hub", "matplotlib", "numpy", "onnx"}
HEAVY |= {"onnxruntime", "pandas", "PIL", "scipy", "timm", "torch", "torchvision", "transformers", "wandb", "yaml"}
UNUSED = {"evaluate", "faster_coco_eval", "matplotlib", "onnx", "onnxruntime", "timm"}


def loaded_by(code: str) -> set[str]:
    """Full names of the modules that a process has after some code, beyond those of an empty one."""
    shown = "import json, sys; before = set(sys.modules)\n{}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    command = [sys.executable, "-c", shown.format(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import hf_detrkd",
        "import hf_detrkd.artifacts.redaction",
        "from hf_detrkd.cli.main import main; main(['--version'])",
        "from hf_detrkd.cli.main import main; main(['--help'])",
    ],
)
def test_little_is_loaded_before_something_is_used(code: str) -> None:
    modules = loaded_by(code)
    assert not HEAVY & {name.split(".")[0] for name in modules}
    assert len(modules) < 80, len(modules)  # before lazy loading: 4,900


def test_the_trainer_loads_only_what_training_uses_and_the_auto_classes_know_our_detectors() -> None:
    """One process for all of it, since transformers takes seconds to import."""
    code = f"""
from hf_detrkd import DistillationTrainer
assert not {sorted(UNUSED)!r} & {{name.split(".")[0] for name in sys.modules}}, "unused libraries"
from transformers import AutoConfig, AutoModelForObjectDetection
assert "hf_detrkd.models.dino_detr.modeling_dino_detr" not in sys.modules
config = AutoConfig.for_model("dino_detr", num_queries=7)
assert AutoModelForObjectDetection._model_mapping[type(config)].__name__ == "DinoDetrForObjectDetection"
""".replace("['evaluate'", "{'evaluate'").replace("'timm']", "'timm'}")
    assert {"hf_detrkd.models.dino_detr.modeling_dino_detr", "hf_detrkd.models.faster_rcnn"} <= loaded_by(code)


def test_every_public_name_is_there_and_known_to_type_checkers() -> None:
    tree = ast.parse((ROOT / "hf_detrkd" / "__init__.py").read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    rooms = {folder.parent.name for folder in (ROOT / "hf_detrkd").glob("*/__init__.py")}
    assert typed | rooms == set(hf_detrkd.__all__) and "DistillationTrainer" in typed
    for name in hf_detrkd.__all__:
        assert getattr(hf_detrkd, name) is not None
        assert name in dir(hf_detrkd)
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = hf_detrkd.NoSuchName


def test_a_config_is_enough_for_the_auto_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that was unpickled, or imported from its own module, was never looked up by its model type."""
    mapping = ModelsRegisteredLater({})
    registered: list[int] = []
    monkeypatch.setattr("hf_detrkd.models.registration.register_classes", lambda: registered.append(1))
    assert FasterRCNNConfig not in mapping and registered == [1]
    assert DetrConfig not in mapping and registered == [1]


def test_a_model_type_that_somebody_registered_stays_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(DetrConfig):
        model_type = "dino_detr"

    content = ConfigsRegisteredLater({"dino_detr": Theirs})
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", content)
    assert CONFIG_MAPPING["faster_rcnn"] is FasterRCNNConfig and CONFIG_MAPPING["dino_detr"] is Theirs


def test_an_evaluate_script_of_the_user_does_not_hide_the_library(tmp_path: Path) -> None:
    (tmp_path / "evaluate.py").write_text("")
    code = f"sys.path.insert(0, {str(tmp_path)!r})\nfrom hf_detrkd import CocoBoxMetric"
    assert "evaluate.module" in loaded_by(code)


def test_a_function_is_called_right_after_a_module_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ModuleType] = []
    monkeypatch.setattr(sys, "meta_path", [AfterImport({"wave": seen.append}), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    assert importlib.util.find_spec("wave") is not None and not seen  # looking is not importing
    wave = importlib.import_module("wave")
    assert seen == [wave] and wave.open and "def open" in inspect.getsource(wave)


def test_entries_that_are_not_ours_stay_as_they_are_and_a_copy_is_complete() -> None:
    mapping = ConfigsRegisteredLater({"dino_detr": 1, "faster_rcnn": 2, "other": 3})
    assert dict(mapping) == {"dino_detr": 1, "faster_rcnn": 2, "other": 3}
    assert mapping.items() == [("dino_detr", 1), ("faster_rcnn", 2), ("other", 3)] and mapping.values() == [1, 2, 3]
    assert mapping.get("other") == 3 and mapping.get("none") is None
