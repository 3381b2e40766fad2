"""An output folder of small files, and a push of it."""

from __future__ import annotations

from pathlib import Path

from hf_detrkd.artifacts.hub.background_push import HubPush, PushedCommit
from hf_detrkd.artifacts.hub.files import STAGE, parts_of


STUDENT = "user/student"
FILES = {
    "config.json": '{"model_type": "detr"}',
    "model.safetensors": "weights" * 1000,
    "README.md": "# A student\n",
    "recipe.yaml": "dataset_name: /home/somebody/images\nlearning_rate: 0.1\n",
    "optimizer.pt": "never",
    "training_args.bin": "never",
    "control/model.safetensors": "never",
    "events.out.tfevents": "never",
}


def pushed(push: HubPush) -> PushedCommit | None:
    for part in parts_of(push.folder, None):
        push.push(part, "End of training")
    return push.finish()


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(f"{STAGE}*"))
