"""What importing the package loads: nothing heavy before it is used, and every public name when it is."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from types import ModuleType

import pytest

import hf_detrkd
from hf_detrkd.models.registration import AfterImport, RegisteredLater
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


def test_the_trainer_loads_no_library_that_a_training_without_evaluation_does_not_use() -> None:
    modules = loaded_by("from hf_detrkd import DistillationTrainer")
    assert not UNUSED & {name.split(".")[0] for name in modules}


def test_every_public_name_is_there_and_known_to_type_checkers() -> None:
    tree = ast.parse((ROOT / "hf_detrkd" / "__init__.py").read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(hf_detrkd.__all__) and "DistillationTrainer" in typed
    for name in hf_detrkd.__all__:
        assert getattr(hf_detrkd, name) is not None
        assert name in dir(hf_detrkd)
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = hf_detrkd.NoSuchName


@pytest.mark.parametrize("first", ["import hf_detrkd", "from transformers import AutoConfig\nimport hf_detrkd"])
def test_the_auto_classes_know_our_detectors_whatever_is_imported_first(first: str) -> None:
    code = f"""{first}
from transformers import AutoConfig, AutoModelForObjectDetection
assert not any(name.startswith("hf_detrkd.models.dino_detr") for name in sys.modules)
config = AutoConfig.for_model("dino_detr", num_queries=7)
assert type(AutoModelForObjectDetection._model_mapping[type(config)]) is type
"""
    assert {"hf_detrkd.models.dino_detr.modeling_dino_detr", "hf_detrkd.models.faster_rcnn"} <= loaded_by(code)


def test_a_function_is_called_once_right_after_a_module_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ModuleType] = []
    finder = AfterImport("wave", seen.append)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    import wave

    assert seen == [wave] and wave.open and finder not in sys.meta_path
    monkeypatch.delitem(sys.modules, "wave")
    import wave as again  # noqa: F401

    assert len(seen) == 1


def test_entries_that_are_not_ours_stay_as_they_are_and_a_copy_is_complete() -> None:
    mapping = RegisteredLater({"dino_detr": 1, "faster_rcnn": 2, "other": 3})
    assert dict(mapping) == {"dino_detr": 1, "faster_rcnn": 2, "other": 3}
    assert mapping.items() == [("dino_detr", 1), ("faster_rcnn", 2), ("other", 3)] and mapping.values() == [1, 2, 3]
