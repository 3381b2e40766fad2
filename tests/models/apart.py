"""A saved model in a process that does not know this package: its code comes with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


CODE = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_detrkd":
            raise ImportError(name)

sys.meta_path.insert(0, Refusing())
import torch
from transformers import AutoModelForObjectDetection

try:
    import hf_detrkd
except ImportError:
    pass
else:
    raise SystemExit("the package can be imported")
model = AutoModelForObjectDetection.from_pretrained("saved", trust_remote_code=True)
assert not model.training
with torch.no_grad():
    output = model(**torch.load("inputs.pt"))
torch.save((output.logits, output.pred_boxes, type(model).__module__), "found.pt")
"""


def answers_apart(folder: Path, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits and boxes of the model in `folder / "saved"`, computed by the code that was saved with it."""
    torch.save(inputs, folder / "inputs.pt")
    cache = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", CODE]
    ran = subprocess.run(command, cwd=folder, env=os.environ | cache, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    logits, boxes, module = torch.load(folder / "found.pt")
    assert module.startswith("transformers_modules.")
    return logits, boxes
