"""FSDP2 on two processes: parameters are sharded, and a run saves, goes on and ends as with DDP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForObjectDetection, Trainer

from tests.runs import assert_close, make_trainer
from tests.together import run_together


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",  # accelerate's default
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
OPTIONS: dict[str, Any] = {
    "family": "deformable_detr/two_stage",
    "method": "kd_detr,clockdistill",
    "widths": (32, 64),
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "adam_epsilon": 1.0,  # steps in proportion to gradients
    "probe": False,
}


@contextmanager
def sharding() -> Iterator[None]:
    """accelerate leaves FSDP out on CPUs, without a word: here it takes them for GPUs."""
    begin = PartialState.__init__

    def as_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    with mock.patch.dict(os.environ, FSDP2), mock.patch.object(PartialState, "__init__", as_gpus):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)


def sharded_run(folder: str, options: dict[str, Any]) -> None:
    with sharding():
        trainer = make_trainer(folder, **options)
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        assert all(isinstance(value, DTensor) for value in trainer.student.parameters())
        figures = trainer.evaluate()
        trainer.save_model()
        print(f"loss {figures['eval_loss']:.6f} after {trainer.state.global_step}, best {trainer.state.best_metric}")


def refused_run(folder: str) -> None:
    with (
        sharding(),
        mock.patch.dict(os.environ, FSDP_VERSION="1"),
        pytest.raises(ValueError, match="needs FSDP2: set"),
    ):
        make_trainer(folder)


def plain_run(folder: str, options: dict[str, Any]) -> None:
    trainer = make_trainer(folder, **options)
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()


def student_in(folder: Path) -> dict[str, torch.Tensor]:
    """As its users load it; a file of sharded weights holds shared ones under other names."""
    return AutoModelForObjectDetection.from_pretrained(folder).state_dict()


@pytest.mark.distributed
def test_a_sharded_run_ends_as_one_that_is_not_also_after_a_resume(tmp_path: Path) -> None:
    first, second = run_together(sharded_run, str(tmp_path / "sharded"), OPTIONS)
    assert "after 4" in first and first.splitlines()[-1] == second.splitlines()[-1]
    run_together(plain_run, str(tmp_path / "plain"), OPTIONS)
    assert_close(*(student_in(tmp_path / name) for name in ("sharded", "plain")), 1e-6)
    file = Path("checkpoint-4", "distillation", "method.safetensors")
    assert_close(*(load_file(tmp_path / name / file) for name in ("sharded", "plain")), 1e-6)

    resumed = OPTIONS | {"resume_from_checkpoint": str(tmp_path / "sharded" / "checkpoint-2")}
    run_together(sharded_run, str(tmp_path / "resumed"), resumed)
    assert_close(*(student_in(tmp_path / name) for name in ("resumed", "plain")), 1e-6)


@pytest.mark.distributed
def test_a_sharded_run_ends_with_its_best_student(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    best |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # so that the first one is the best
    run_together(sharded_run, str(tmp_path), OPTIONS | best)
    ends = [student_in(tmp_path / name) for name in ("", "checkpoint-2", "checkpoint-4")]
    assert_close(ends[0], ends[1], 0.0)
    assert any(not torch.equal(value, ends[2][name]) for name, value in ends[0].items())


@pytest.mark.distributed
def test_the_average_of_a_sharded_run_is_that_of_one_that_is_not_also_after_a_resume(tmp_path: Path) -> None:
    options = OPTIONS | {"ema_decay": 0.6, "eval_strategy": "steps", "eval_steps": 1}
    first, _ = run_together(sharded_run, str(tmp_path / "sharded"), options)
    run_together(plain_run, str(tmp_path / "plain"), options)
    for place in (".", "checkpoint-2", "checkpoint-4"):
        assert_close(*(student_in(tmp_path / name / place) for name in ("sharded", "plain")), 1e-6)
    file = Path("checkpoint-4", "distillation", "trained_student.safetensors")
    trained, plain = (load_file(tmp_path / name / file) for name in ("sharded", "plain"))
    assert_close(trained, plain, 1e-6)
    average = student_in(tmp_path / "sharded" / "checkpoint-4")
    assert any(not torch.equal(value, trained[name]) for name, value in average.items() if name in trained)

    resumed = options | {"resume_from_checkpoint": str(tmp_path / "sharded" / "checkpoint-2")}
    second, _ = run_together(sharded_run, str(tmp_path / "resumed"), resumed)
    assert_close(*(student_in(tmp_path / name) for name in ("resumed", "plain")), 1e-6)
    assert second.splitlines()[-1] == first.splitlines()[-1]


@pytest.mark.distributed
def test_the_former_version_of_fsdp_is_refused(tmp_path: Path) -> None:
    run_together(refused_run, str(tmp_path))


def zero(stage: int) -> dict[str, Any]:
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    own_optimizer = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {"zero_optimization": {"stage": stage}, **own_optimizer, **dict.fromkeys(sizes, "auto")}


def zero_run(folder: str, stage: int, options: dict[str, Any]) -> None:
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"):
        trainer = make_trainer(folder, deepspeed=zero(stage), **options)
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        assert trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_of_deepspeed_ends_as_one_without_it_also_after_a_resume(tmp_path: Path, stage: int) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    run_together(zero_run, str(tmp_path / "zero"), stage, OPTIONS)
    run_together(plain_run, str(tmp_path / "plain"), OPTIONS)
    resumed = OPTIONS | {"resume_from_checkpoint": str(tmp_path / "zero" / "checkpoint-2")}
    run_together(zero_run, str(tmp_path / "resumed"), stage, resumed)
    for name in ("zero", "resumed"):
        assert_close(*(student_in(tmp_path / place) for place in (name, "plain")), 1e-6)


def test_a_stage_that_would_shard_the_teacher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = mock.Mock(zero_stage=3)

    def as_deepspeed(self: Trainer) -> None:
        self.is_fsdp_enabled, self.is_deepspeed_enabled = False, True
        self.accelerator = mock.Mock(state=mock.Mock(deepspeed_plugin=plugin))

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", as_deepspeed)
    with pytest.raises(ValueError, match="set stage 1 or 2, or use FSDP2"):
        make_trainer(tmp_path)
