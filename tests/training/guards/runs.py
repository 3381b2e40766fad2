"""A run with a fault: what the tests of the guards share."""

from __future__ import annotations

import torch

from hf_detrkd import DistillationTrainer


def broken(trainer: DistillationTrainer) -> None:
    with torch.no_grad():
        trainer.distiller.teacher.model.model.decoder.class_embed[-1].weight.fill_(torch.nan)
