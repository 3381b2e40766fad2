"""A student that is its teacher: what every method at its defaults compares is equal, for every detector."""

from __future__ import annotations

import pytest
import torch

from hf_detrkd.adapters import adapter_for
from hf_detrkd.distillation.distiller import Distiller
from hf_detrkd.distillation.teacher import Teacher
from hf_detrkd.methods import METHODS
from hf_detrkd.structures.loss_key import LossKey
from tests import tiny


COMPARING = [name for name, method in METHODS.items() if method.needs_teacher]
REFUSED = {  # pairs without the queries that a method's defaults need: it says so
    "kd_detr": ("yolos",),
    "detrdistill": ("yolos", "faster_rcnn"),
    "clockdistill": ("detr", "table-transformer", "yolos"),
}
PAIRS = [(n, d) for n in COMPARING for d in tiny.DETECTORS if d not in REFUSED.get(n, ())]


def is_compared(key: LossKey, num_layers: int) -> bool:
    """Not what the ground truth supervises (DETRDistill's assignment), nor the layers before the last that KD-DETR's
    formula teaches by the teacher's last layer."""
    if key.method == "kd_detr":
        return key.layer == num_layers - 1
    return not key.part.startswith("assignment")


@pytest.mark.parametrize(("name", "detector"), PAIRS)
def test_a_student_that_is_its_teacher_has_no_loss_at_the_defaults(build, name, detector):
    student, teacher = build(detector), Teacher(build(detector), tiny.LABELS)
    method = METHODS[name](METHODS[name].config_class(), adapter_for(student).spec, teacher.spec)
    distiller = Distiller(student, teacher, [method])
    if detector == "faster_rcnn":  # it has proposals in training only
        student.train()
        for module in student.modules():
            module.training = module.training and not isinstance(module, torch.nn.BatchNorm2d)
    distiller.training = True  # the methods run, and a DETR is in eval mode as its teacher is
    losses = distiller.losses(tiny.batch(64, boxes=(2, 1))).distillation
    layers = adapter_for(student).spec.num_layers
    compared = {key: value for key, value in losses.items() if is_compared(key, layers)}
    assert compared and all(value.isfinite() for value in losses.values())
    for key, value in compared.items():
        assert abs(float(value)) < 2e-4, (key, value)


@pytest.mark.parametrize(("name", "detector"), [(name, d) for name, refused in REFUSED.items() for d in refused])
def test_a_pair_without_common_queries_is_refused(build, name, detector):
    spec = adapter_for(build(detector)).spec
    with pytest.raises(ValueError):
        METHODS[name](METHODS[name].config_class(), spec, spec)
